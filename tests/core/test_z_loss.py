"""The Z-loss and cross-entropy with soft targets: worked numbers, invariances, edges, and training with them."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.core import Classification
from lightning_kd.core.losses import soft_cross_entropy, z_loss

LOGITS = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
THIRD = torch.tensor([2])


def values(seed, rows=5, columns=6):
    return 3 * torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(logits, target, *args):
    logits = logits.clone().requires_grad_()
    z_loss(logits, target, *args, reduction="sum").backward()
    return logits.grad


@pytest.mark.parametrize(
    ("a", "b", "value", "slope"),
    [
        (1.0, 0.0, 0.4943348, (0.0349, 0.0698, -0.2442, 0.1395)),
        (2.0, 1.0, 0.6957596, (0.0672, 0.1344, -0.4704, 0.2688)),
    ],
)
def test_z_loss_worked_numbers(a, b, value, slope):
    assert z_loss(LOGITS, THIRD, a, b).item() == pytest.approx(value, abs=1e-7)
    assert gradient(LOGITS, THIRD, a, b)[0].tolist() == pytest.approx(slope, abs=5e-5)


@pytest.mark.parametrize(("a", "b", "value"), [(1000.0, 28.0, 27.5527864), (1e-4, 0.0, 6931.2482013)])
def test_z_loss_of_extreme_sharpness(a, b, value):
    assert z_loss(LOGITS, THIRD, a, b).item() == pytest.approx(value, rel=1e-9)


def test_z_loss_of_one_hot_logits():
    logits = torch.eye(10, dtype=torch.float64)[:1]
    for target, z in ((0, 3.0), (4, -1 / 3)):
        expected = F.softplus(torch.tensor(-z, dtype=torch.float64)).item()
        assert z_loss(logits, torch.tensor([target])).item() == pytest.approx(expected, rel=1e-9)


def test_z_loss_is_shift_and_scale_invariant_and_passes_gradcheck():
    logits, target = values(0), torch.arange(5)
    plain = z_loss(logits, target, 2.0, 0.5, reduction="none", eps=0.0)
    moved = z_loss(7 * logits - 40, target, 2.0, 0.5, reduction="none", eps=0.0)
    torch.testing.assert_close(moved, plain, rtol=1e-12, atol=0)
    slope = gradient(logits, target, 2.0, 0.5)
    assert slope.sum(1).abs().max() < 1e-12
    assert (slope * logits).sum(1).abs().max() < 1e-11
    assert gradcheck(lambda x: z_loss(x, target, 2.0, 0.5), logits.requires_grad_())


def test_z_loss_reductions_and_precision():
    logits, target = values(1), torch.arange(5)
    each = z_loss(logits, target, reduction="none")
    assert z_loss(logits, target).item() == pytest.approx(each.mean().item())
    assert z_loss(logits, target, reduction="sum").item() == pytest.approx(each.sum().item())
    far = (logits + 1e4).float()  # mean square minus squared mean would lose all digits
    assert z_loss(far, target).item() == pytest.approx(each.mean().item(), rel=2e-3)
    half = logits.bfloat16()
    assert z_loss(half, target).dtype == torch.float32
    assert z_loss(half, target).item() == z_loss(half.float(), target).item()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_equal_logits_have_a_loss_and_no_gradient(value):
    logits = torch.full((2, 7), value)
    logits[1, 2] += 1  # the logits of the other sample differ
    target = torch.tensor([3, 2])
    assert z_loss(logits, target, 2.0, 1.0, reduction="none")[0].item() == pytest.approx(1.0634640)
    slope = gradient(logits, target)
    assert not slope[0].any()
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": 0.0}, "a must be above 0, got 0.0"),
        ({"b": float("nan")}, "b must be finite, got nan"),
        ({"reduction": "total"}, "reduction must be 'mean', 'sum' or 'none', got 'total'"),
        ({"logits": torch.zeros(2, 2)}, "at least 3 classes, got .*take cross-entropy"),
        ({"logits": torch.full((2, 3), float("inf"))}, "logits must be finite, got NaN or infinity"),
        ({"target": torch.full((2, 3), 1 / 3)}, "target must be int64"),
    ],
)
def test_z_loss_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        z_loss(**{"logits": torch.arange(6.0).view(2, 3), "target": torch.tensor([0, 1]), **arguments})


def test_soft_cross_entropy_equals_torchs():
    logits, target = values(2), values(3).softmax(1)
    loss = soft_cross_entropy(logits.requires_grad_(), target.requires_grad_())
    assert loss.item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-12)
    loss.backward()
    assert target.grad is None
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - target).detach() / 5)
    hard = torch.arange(5)
    one_hot = F.one_hot(hard, 6).double()
    assert soft_cross_entropy(logits, one_hot).item() == F.cross_entropy(logits, hard).item()
    ruled_out = torch.tensor([[0.0, float("-inf"), 0.0]], requires_grad=True)
    loss = soft_cross_entropy(ruled_out, torch.tensor([[0.5, 0.0, 0.5]]))
    assert loss.item() == pytest.approx(0.6931472)
    assert soft_cross_entropy(logits.half(), target).dtype == torch.float64


def loader(count=24):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), 8)


def trained(network, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    task = Classification(network, 3, input_shape=(4,), loss="z", **options)
    trainer.fit(task, loader())
    return task, trainer


def test_training_loss_is_the_mean_z_loss():
    network = nn.Linear(4, 3)
    expected = [z_loss(network(x), y, 2.0, 1.0).item() for x, y in loader()]
    task, trainer = trained(network, z_a=2.0, z_b=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(expected) / 3)
    assert not task.loss_is_plain  # the Z-loss of guessing is not log(C)


def test_classifier_starting_from_zero_warns():
    zero = nn.Linear(4, 3)
    nn.init.zeros_(zero.weight)
    nn.init.constant_(zero.bias, 0.3)
    before = zero.weight.clone()
    with pytest.warns(UserWarning, match="logits of the first batch are all equal.*random weights"):
        trained(zero)
    assert torch.equal(zero.weight, before)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*all equal.*")
        trained(nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "zed"}, "loss must be 'ce' or 'z', got 'zed'"),
        ({"loss": "z", "z_a": 0}, "z_a must be above 0, got 0"),
        ({"loss": "z", "num_classes": 2}, "num_classes must be at least 3, got 2: the Z-loss of two classes"),
        ({"loss": "z", "label_smoothing": 0.1}, "label_smoothing is for loss='ce' only, got 0.1 with loss='z'"),
        ({"loss": "z", "class_weights": [1.0, 2.0, 3.0]}, "class_weights is for loss='ce' only"),
        ({"loss": "z", "use_sampling_weights": True}, "use_sampling_weights is for loss='ce' only"),
    ],
)
def test_classification_with_wrong_loss_options_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        Classification(**{"network": nn.Linear(4, 3), "num_classes": 3, "input_shape": (4,), **arguments})
