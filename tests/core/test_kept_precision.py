"""Buffers and averages that stay in float32 when a Trainer casts a task to half precision."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_kd import Classification
from lightning_kd.core.averaged_task import AveragedTask
from lightning_kd.core.kept_precision import KeptPrecision
from lightning_kd.distillation import KD, KDPlusPlus
from lightning_kd.distillation._negative_images import NegativeImages
from lightning_kd.noisy_labels import BLDR, ELRPlus
from lightning_kd.weak_labels import NetworkEM
from tests.core.runs import loader, trainer

HALVES = [torch.float16, torch.bfloat16]


class Holder(KeptPrecision):
    def __init__(self):
        super().__init__()
        self.keep_precise("count", "average", "missing")
        self.register_buffer("other", torch.ones(2))
        self.register_buffer("count", torch.tensor([257.0, 70_000.0]))
        self.average, self.network = nn.Linear(1, 1), nn.Linear(1, 1)


@pytest.mark.parametrize("dtype", HALVES)
def test_named_parts_keep_their_precision_and_the_rest_is_cast(dtype):
    holder = Holder()
    names = list(holder.state_dict())
    weight = holder.average.weight.clone()
    for cast in (holder.to(dtype), holder.to("cpu", dtype), holder.type(dtype)):
        assert cast is holder
        assert holder.count.tolist() == [257, 70_000]
        assert torch.equal(holder.average.weight, weight)
        assert {holder.other.dtype, holder.network.weight.dtype} == {dtype}
    assert list(holder.state_dict()) == names
    assert {value.dtype for value in holder.double().state_dict().values()} == {torch.float64}
    assert all(value.is_meta for value in holder.to("meta", dtype).state_dict().values())


@pytest.mark.parametrize("dtype", HALVES)
def test_metrics_of_a_half_precision_task_stay_exact(dtype):
    task = Classification(nn.Linear(4, 3), 3, input_shape=(4,)).to(dtype)
    for k in range(600):  # in bfloat16 256 + 1 is 256
        task.val_metrics["loss"].update(
            torch.tensor(200.0 + k % 2), 1
        )  # in float16 all that is above 65504 is infinite
        task.val_metrics["ece"].update(torch.tensor([[0.9, 0.06, 0.04]]), torch.tensor([k % 2]))
    assert float(task.val_metrics["loss"].compute()) == pytest.approx(200.5)
    assert float(task.val_metrics["ece"].compute()) == pytest.approx(0.4, abs=1e-5)


def task_of(kind, **options):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return kind(network, 3, input_shape=(4,), **options)


def test_statistics_of_methods_are_not_cast_to_half_precision():
    distilled = KDPlusPlus(*(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)) for _ in range(2)), 3, input_shape=(4,))
    crowd, noisy = task_of(NetworkEM), BLDR("cnn_tiny", 3, input_shape=(3, 8, 8))
    for task in (distilled.half(), crowd.bfloat16(), noisy.half()):
        assert torch.float32 not in {p.dtype for p in task.parameters() if p.requires_grad}
    assert distilled.class_mean.dtype == noisy.rho.dtype == torch.float32
    assert crowd.confusions.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [AveragedTask, ELRPlus, BLDR])
def test_weight_averages_predict_in_float32(kind, dtype):
    task = kind("cnn_tiny", 3, input_shape=(3, 8, 8)).to(dtype).eval()
    image = torch.rand(2, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        assert task(image).dtype == torch.float32
    parts = task.averages if kind is ELRPlus else task.average
    assert {value.dtype for value in parts.parameters()} == {torch.float32}


def test_weight_average_takes_steps_below_bfloat16_resolution():
    task = task_of(AveragedTask, average_decay=0.999, optimizer=partial(torch.optim.SGD, lr=0.0))
    start = task.average[1].weight.clone()
    with torch.no_grad():
        task.network[1].weight.add_(1)
    trainer(2, precision="bf16-true").fit(task, loader())  # 8 steps
    torch.testing.assert_close(task.average[1].weight - start, torch.full((5, 4), 0.008), rtol=0.1, atol=0)


@pytest.mark.parametrize("method", [Classification, KD])
def test_default_optimizer_trains_in_float16(method):
    networks = (nn.Linear(4, 3), nn.Linear(4, 3))[: 2 if method is KD else 1]
    task = method(*networks, 3, input_shape=(4,))
    before = task.main_network.weight.clone()
    trainer(1, precision="16-true").fit(task, loader())
    moved = (task.main_network.weight.float() - before).abs()
    assert 0 < moved.max() < 0.01


def test_eps_that_is_0_in_float16_raises():
    for given in (torch.optim.Adam, partial(torch.optim.AdamW, eps=1e-4)):
        task = Classification(nn.Linear(4, 3), 3, input_shape=(4,), optimizer=given)
        trainer(1, precision="bf16-true").fit(task, loader())
        task = Classification(nn.Linear(4, 3), 3, input_shape=(4,), optimizer=given)
        if given is not torch.optim.Adam:
            trainer(1, precision="16-true").fit(task, loader())
            continue
        with pytest.raises(
            ValueError, match="eps=1e-08 of Adam is 0 in float16, and the optimizer would divide by it: set eps"
        ):
            trainer(1, precision="16-true").fit(task, loader())


def test_negative_images_are_drawn_the_same_in_every_precision():
    images = NegativeImages(torch.arange(40_000) % 2, 200)
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)  # as the Trainer does around a step
        try:
            drawn.append(images.draw(torch.tensor([0]), torch.Generator().manual_seed(0)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*(rows.sort().values for rows in drawn))


def test_teacher_input_is_renormalised_before_rounding_to_bfloat16():
    class Kept(nn.Module):
        def forward(self, image):
            self.image = image
            return image[:, :, 0, 0].repeat(1, 3)

    teacher = Kept()
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    task = KD(student, teacher, 3, input_shape=(1, 2, 2), teacher_mean=[0.3], teacher_std=[0.3]).bfloat16()
    task.teacher.set_data_normalisation([0.1], [0.9])
    task.teacher(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16))
    assert teacher.image.dtype == torch.bfloat16
    assert teacher.image[0, 0, 0, 0] == torch.tensor(3 - 2 / 3).bfloat16()
