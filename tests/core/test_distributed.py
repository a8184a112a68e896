"""Gathering rows and averaging gradients over processes."""

import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightning_kd.core.batch import Batch
from lightning_kd.core.distributed import average_gradients, gather_by_index
from lightning_kd.core.inference_pass import ordered_pass
from tests.two_processes import on_two_ranks


def test_gathered_rows_are_sorted_and_unique():
    index, value, rows = gather_by_index(
        torch.tensor([4, 1, 4, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.arange(8).view(4, 2)
    )
    assert index.tolist() == [1, 2, 4]
    assert value.tolist() == [2.0, 4.0, 1.0]
    assert rows.tolist() == [[2, 3], [6, 7], [0, 1]]


def _gather_and_average_on_a_rank():
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    rank = dist.get_rank()
    index = [torch.tensor([5, 0, 3]), torch.tensor([3, 4])][rank]  # 3 is on both, to fill the last batch
    gathered = gather_by_index(index, 10 * index)
    weights = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    weights[0].grad = torch.arange(6.0).view(2, 3) * (1 + 2 * rank)
    weights[1].grad = torch.full((4,), float(rank))
    average_gradients(weights)
    batches = [] if rank else [Batch(torch.ones(1, 2), torch.tensor([0]), torch.tensor([7]))]  # one sample in total
    task = nn.Linear(2, 1)
    strategy = SimpleNamespace(batch_to_device=lambda batch: batch)
    task.trainer = SimpleNamespace(precision_plugin=Precision(), strategy=strategy)
    found, value = ordered_pass(task, batches, lambda batch: (batch.image.sum(1),))
    assert (found.tolist(), value.tolist()) == ([7], [2.0])
    dist.destroy_process_group()
    return [part.tolist() for part in gathered], weights[0].grad.tolist(), weights[1].grad.tolist(), weights[2].grad


def test_two_processes_gather_rows_and_average_gradients():
    for gathered, first, second, none in on_two_ranks(_gather_and_average_on_a_rank):
        assert gathered == [[0, 3, 4, 5], [0, 30, 40, 50]]
        assert first == (torch.arange(6.0).view(2, 3) * 2).tolist()  # the mean of factors 1 and 3
        assert second == [0.5] * 4
        assert none is None


def test_one_process_keeps_its_gradients():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    average_gradients([weight])
    assert weight.grad.tolist() == [1.0, 2.0, 3.0]
