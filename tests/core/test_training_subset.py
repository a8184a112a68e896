"""Fixed training samples from a data module and from a user's loader."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler, TensorDataset

from lightning_kd.core.training_subset import training_samples
from lightning_kd.data import DigitsDataModule
from tests.two_processes import on_two_ranks


def digits():
    data = DigitsDataModule(fake=True, batch_size=16)
    data.setup()
    return data


def dataset():
    target = torch.arange(90) % 9 // 4  # classes 0, 1, 2 with 40, 40, 10 samples
    return TensorDataset(torch.randn(90, 4), target)


def all_of(samples):
    batches = list(samples.loader)
    return torch.cat([b.image for b in batches]), torch.cat([b.target for b in batches])


@pytest.mark.parametrize("make", [digits, lambda: DataLoader(dataset(), batch_size=8, shuffle=True)])
def test_subset_repeats_differs_by_stream_and_can_be_excluded(make):
    source = make()
    first, again = (training_samples(source, 20, seed=1, stream="a") for _ in range(2))
    other = training_samples(source, 20, seed=1, stream="b")
    assert len(first.indices) == 20
    assert (first.indices == again.indices).all()
    assert (first.indices != other.indices).any()
    image, target = all_of(first)
    assert image.equal(all_of(first)[0])  # the loader can be read again
    assert len(target) == 20
    rest = training_samples(source, None, exclude=first.indices)
    assert not np.isin(rest.indices, first.indices).any()
    total = len(source.train_indices) if hasattr(source, "train_indices") else len(source.dataset)
    assert len(rest.indices) == total - 20


@pytest.mark.parametrize("make", [digits, lambda: DataLoader(dataset(), batch_size=8)])
def test_balanced_subset_has_equally_many_samples_of_each_class(make):
    source = make()
    classes = getattr(source, "num_classes", 3)
    target = all_of(training_samples(source, 3 * classes + 1, balanced=True, num_classes=classes))[1]
    assert sorted(torch.bincount(target).tolist()) == [3] * (classes - 1) + [4]


def test_balanced_subset_takes_all_samples_of_a_small_class():
    samples = training_samples(DataLoader(dataset(), batch_size=8), 60, balanced=True, num_classes=3)
    assert torch.bincount(all_of(samples)[1]).tolist() == [20, 20, 10]


def test_wrong_counts_and_unsized_data_raise():
    source = DataLoader(dataset(), batch_size=8)
    with pytest.raises(ValueError, match="no training sample is left"):
        training_samples(source, 5, exclude=np.arange(90))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        training_samples(source, 0)
    with pytest.raises(ValueError, match="num_classes is needed"):
        training_samples(source, 5, balanced=True)

    class Endless(IterableDataset):
        def __iter__(self):
            yield torch.zeros(4), 0

    with pytest.raises(ValueError, match="dataset with a length, got Endless"):
        training_samples(DataLoader(Endless()), 5)


def test_subset_follows_known_samplers_and_others_raise():
    half = DataLoader(dataset(), batch_size=8, sampler=SubsetRandomSampler(range(40)))
    assert training_samples(half, None).indices.tolist() == list(range(40))

    class Mine(SequentialSampler):
        pass

    class Other(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(range(5))

        def __len__(self):
            return 5

    assert len(training_samples(DataLoader(dataset(), sampler=Mine(dataset())), None).indices) == 90
    with pytest.raises(ValueError, match="a loader with a Other"):
        training_samples(DataLoader(dataset(), sampler=Other()), None)


def test_dict_batches_pass_and_a_label_beyond_num_classes_raises():
    items = [{"x": torch.tensor(float(k)), "y": k % 2} for k in range(6)]
    batches = list(training_samples(DataLoader(items, batch_size=4), 5).loader)
    assert [sorted(batch) for batch in batches] == [["x", "y"]] * 2
    with pytest.raises(ValueError, match=r"label 2 of sample .* is not below num_classes=2"):
        training_samples(DataLoader(dataset(), batch_size=8), 9, balanced=True, num_classes=2)


def _subset_on_a_rank():
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    samples = training_samples(DataLoader(dataset(), batch_size=8), 21)
    return samples.indices.tolist(), torch.cat([batch.index for batch in samples.loader]).tolist()


def test_two_processes_split_the_subset_of_a_plain_loader():
    (chosen, first), (same, second) = on_two_ranks(_subset_on_a_rank)
    assert chosen == same
    assert sorted(first + second) == chosen
