"""The losses of the baselines against worked numbers, identities and a float64 reference."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from lightning_kd.core import losses as core
from lightning_kd.noisy_labels import (
    coteaching_losses,
    elr_regularizer,
    forget_rate,
    gce_loss,
    mixup_loss,
    negative_learning_loss,
    sce_loss,
)
from lightning_kd.noisy_labels.negative_learning import draw_complementary

P = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
LOGITS = P.log()
RIGHT, WRONG = torch.tensor([0]), torch.tensor([1])
LOSSES = {
    "gce": lambda z, y: gce_loss(z, y, 0.7),
    "sce": lambda z, y: sce_loss(z, y, 0.1, 1.0),
    "negative": negative_learning_loss,
    "mixup": lambda z, y: mixup_loss(z, y, y.flip(0), 0.3),
    "elr": lambda z, y: elr_regularizer(z, (z.detach().double() / 3).softmax(1).to(z.dtype)),
    "coteaching": lambda z, y: coteaching_losses(z, z.flip(0), y, 0.4)[0],
}


def random_batch(seed=0, size=6, classes=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (size,), generator=generator)


def gradient(function, logits):
    logits = logits.clone().requires_grad_()
    function(logits).backward()
    return logits.grad


@pytest.mark.parametrize(
    ("q", "target", "value"), [(0.7, 1, 0.965527), (1.0, 1, 0.8), (1e-6, 1, 1.60944), (0.7, 0, 0.315634)]
)
def test_gce_worked_numbers(q, target, value):
    assert gce_loss(LOGITS, torch.tensor([target]), q).item() == pytest.approx(value, abs=1e-5 if q < 0.1 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gce_with_q_near_0_is_cross_entropy_in_either_precision(dtype):
    assert gce_loss(LOGITS.to(dtype), WRONG, 1e-6).item() == pytest.approx(1.609438, abs=3e-6)


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_gce_gradient_is_that_of_cross_entropy_times_a_power_of_p(q):
    logits, target = random_batch()
    factor = logits.softmax(1).gather(1, target[:, None]) ** q
    expected = factor * gradient(lambda z: F.cross_entropy(z, target), logits)
    torch.testing.assert_close(gradient(lambda z: gce_loss(z, target, q), logits), expected)


def test_gce_of_a_label_of_probability_0_has_a_finite_gradient():
    logits = torch.tensor([[300.0, 0.0, 0.0]])  # p_y is rounded to 0
    assert gce_loss(logits, WRONG, 0.7).item() == pytest.approx(1 / 0.7)
    assert gradient(lambda z: gce_loss(z, WRONG, 0.7), logits).isfinite().all()


@pytest.mark.parametrize("q", [0.0, -0.5, 1.5, float("nan")])
def test_gce_with_wrong_q_raises(q):
    with pytest.raises(ValueError, match=r"q must be above 0 and at most 1, got"):
        gce_loss(LOGITS, WRONG, q)


def test_sce_worked_numbers():
    assert sce_loss(LOGITS, WRONG, 0.1, 1.0).item() == pytest.approx(7.529216, abs=1e-6)
    assert sce_loss(LOGITS, WRONG, 0.1, 1.0, log_zero=-4.0).item() == pytest.approx(0.1609438 + 3.2, abs=1e-6)


def test_sce_without_reverse_is_cross_entropy():
    logits, target = random_batch()
    assert sce_loss(logits, target, 0.3, 0.0).item() == pytest.approx(0.3 * F.cross_entropy(logits, target).item())


def test_reverse_cross_entropy_equals_its_definition_and_is_bounded():
    logits, target = random_batch(scale=8.0)
    p = logits.softmax(1).clamp(1e-7, 1)
    label = F.one_hot(target, 5).double().clamp(1e-4, 1)
    assert sce_loss(logits, target, 0.0, 1.0).item() == pytest.approx(-(p * label.log()).sum(1).mean().item())
    far = torch.tensor([[1000.0, 0.0, 0.0]])
    assert sce_loss(far, WRONG, 0.0, 1.0).item() == pytest.approx(9.2104, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 1.0), "alpha must be at least 0"),
        ((1.0, -0.1), "beta must be at least 0"),
        ((1.0, 1.0, 0.0), "log_zero"),
    ],
)
def test_sce_with_wrong_arguments_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        sce_loss(LOGITS, WRONG, *arguments)


def test_negative_learning_worked_numbers():
    assert negative_learning_loss(LOGITS, torch.tensor([0])).item() == pytest.approx(1.203973, abs=1e-6)
    assert negative_learning_loss(LOGITS, torch.tensor([2])).item() == pytest.approx(0.105361, abs=1e-6)
    assert gradient(lambda z: negative_learning_loss(z, torch.tensor([1])), LOGITS)[0, 1].item() == pytest.approx(0.2)
    several = negative_learning_loss(LOGITS, torch.tensor([[0, 2, 2]])).item()
    assert several == pytest.approx((1.203973 + 2 * 0.105361) / 3, abs=1e-6)


def test_negative_learning_is_clamped():
    far = torch.tensor([[40.0, 0.0, 0.0]])
    assert negative_learning_loss(far, RIGHT).item() == pytest.approx(-math.log(1e-5))
    assert not gradient(lambda z: negative_learning_loss(z, RIGHT), far).any()
    assert negative_learning_loss(far, RIGHT, eps=0.0).item() == pytest.approx(40 - math.log(2), abs=1e-4)


def test_negative_learning_weights_samples():
    logits, target = random_batch()
    weight = torch.arange(1.0, 7.0, dtype=torch.float64)
    each = torch.stack([negative_learning_loss(logits[i : i + 1], target[i : i + 1]) for i in range(6)])
    assert core.negative_learning_loss(logits, target, 1e-5, weight).item() == pytest.approx((weight * each).mean())


def test_complementary_classes_are_uniform_over_the_others():
    target = torch.tensor([0, 2, 3])
    drawn = draw_complementary(target, 4, 6000, np.random.default_rng(0))
    assert drawn.shape == (3, 6000)
    assert drawn.dtype == torch.int64
    for row, own in zip(drawn, target, strict=True):
        counts = row.bincount(minlength=4)
        assert counts[own] == 0
        assert counts[counts > 0].tolist() == pytest.approx([2000] * 3, rel=0.06)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_mixup_is_cross_entropy_with_mixed_labels(weight):
    logits, target = random_batch()
    partner = target.roll(1)
    label = weight * F.one_hot(target, 5).double() + (1 - weight) * F.one_hot(partner, 5).double()
    expected = F.cross_entropy(logits, label)
    assert mixup_loss(logits, target, partner, weight).item() == pytest.approx(expected.item())
    if weight in (0.0, 1.0):
        plain = F.cross_entropy(logits, target if weight else partner)
        assert mixup_loss(logits, target, partner, weight).item() == plain.item()


def test_mixup_with_wrong_weight_raises():
    with pytest.raises(ValueError, match=r"weight must be at least 0 and at most 1, got 1.5"):
        mixup_loss(LOGITS, RIGHT, WRONG, 1.5)


def test_elr_worked_numbers():
    rows = 0.3 * P
    value = elr_regularizer(LOGITS, rows).item()
    assert (value, 3 * value) == pytest.approx((-0.176737, -0.530212), abs=1e-6)


def test_elr_gradient_equals_its_formula():
    rows = torch.tensor([[0.1, 0.5, 0.2]], dtype=torch.float64)
    inner = (rows * P).sum()
    expected = -P * (rows - inner) / (1 - inner)
    torch.testing.assert_close(gradient(lambda z: elr_regularizer(z, rows), LOGITS), expected)
    assert expected[0].argmin() == 1  # descent raises the class that the memory favours, not the predicted one


def test_elr_has_no_gradient_through_the_memory():
    logits = LOGITS.clone().requires_grad_()
    rows = logits.softmax(1) * 0.9
    elr_regularizer(logits, rows).backward()
    torch.testing.assert_close(logits.grad, gradient(lambda z: elr_regularizer(z, rows.detach()), LOGITS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_elr_of_saturated_predictions_is_bounded(dtype):
    logits = torch.tensor([[200.0, 0.0, 0.0]], dtype=dtype)
    rows = torch.tensor([[1.0, 0.0, 0.0]])
    assert elr_regularizer(logits, rows).item() == pytest.approx(math.log(1e-4), abs=2e-3)
    assert gradient(lambda z: elr_regularizer(z, rows), logits).isfinite().all()


def test_elr_with_different_shapes_raises():
    with pytest.raises(ValueError, match=r"logits \(1, 3\) and memory_rows \(1, 4\) must both be"):
        elr_regularizer(LOGITS, torch.zeros(1, 4))


def test_forget_rate_worked_numbers():
    rates = [forget_rate(t, 0.2) for t in range(12)]
    assert rates[:2] == pytest.approx([0.0, 0.022222], abs=1e-6)
    assert rates[9:] == pytest.approx([0.2] * 3)
    assert rates == sorted(rates)
    assert [forget_rate(t, 0.25, 3, 0.5) for t in range(4)] == pytest.approx([0.0, 0.25, 0.5, 0.25])
    assert [forget_rate(t, 0.25, 1) for t in range(2)] == [0.0, 0.25]
    assert [forget_rate(t, 0.0) for t in (0, 5, 20)] == [0.0] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0,), "noise_rate must be"),
        ((-0.1,), "noise_rate must be"),
        ((0.2, 0), "ramp_epochs"),
        ((0.2, 5, 0.0), "exp"),
    ],
)
def test_forget_rate_with_wrong_arguments_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        forget_rate(0, *arguments)


def test_coteaching_keeps_the_samples_of_smallest_loss_of_the_other_network():
    first, target = random_batch(0)
    second, _ = random_batch(1)
    each = [F.cross_entropy(z, target, reduction="none") for z in (first, second)]
    easy = [losses.argsort()[:3] for losses in each]
    loss_1, loss_2 = coteaching_losses(first, second, target, 0.5)
    assert loss_1.item() == pytest.approx(each[0][easy[1]].mean().item())
    assert loss_2.item() == pytest.approx(each[1][easy[0]].mean().item())
    swapped = coteaching_losses(second, first, target, 0.5)
    assert [loss.item() for loss in swapped] == [loss_2.item(), loss_1.item()]
    chosen = gradient(lambda z: coteaching_losses(z, second, target, 0.5)[0], first).abs().sum(1).nonzero().squeeze(1)
    assert chosen.tolist() == sorted(easy[1].tolist())


def test_coteaching_selection_has_no_gradient_between_the_networks():
    first, target = random_batch(0)
    second, _ = random_batch(1)
    second.requires_grad_()
    first.requires_grad_()
    coteaching_losses(first, second, target, 0.5)[0].backward()
    assert second.grad is None


def test_coteaching_of_equal_losses_keeps_the_first():
    second = torch.zeros(5, 3)
    first = torch.tensor([[float(i), 0.0, 0.0] for i in range(5)])
    loss, _ = coteaching_losses(first, second, torch.zeros(5, dtype=torch.int64), 0.6)
    assert loss.item() == pytest.approx(F.cross_entropy(first[:2], torch.zeros(2, dtype=torch.int64)).item())


@pytest.mark.parametrize(
    ("rate", "size", "kept"), [(0.9, 10, 1), (0.7, 10, 3), (0.45, 10, 5), (0.0, 7, 7), (0.9, 9, 0)]
)
def test_coteaching_rounds_the_number_of_kept_samples_down(rate, size, kept):
    logits = torch.zeros(size, 3, requires_grad=True)
    losses = coteaching_losses(logits, torch.zeros(size, 3), torch.zeros(size, dtype=torch.int64), rate)
    losses[0].backward()
    assert int(logits.grad.any(1).sum()) == kept
    assert losses[0].item() == pytest.approx(math.log(3) if kept else 0.0)


def test_coteaching_with_wrong_shapes_or_rate_raises():
    with pytest.raises(ValueError, match=r"logits_1 \(1, 3\) and logits_2 \(2, 3\)"):
        coteaching_losses(LOGITS, LOGITS.repeat(2, 1), RIGHT, 0.1)
    with pytest.raises(ValueError, match=r"forget_rate must be at least 0 and at most 1, got 1.2"):
        coteaching_losses(LOGITS, LOGITS, RIGHT, 1.2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_passes(name):
    logits, target = random_batch()
    if name == "elr":
        rows = random_batch(3)[0].softmax(1)
        assert gradcheck(lambda z: elr_regularizer(z, rows), logits.requires_grad_())
    else:
        assert gradcheck(lambda z: LOSSES[name](z, target), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype):
    logits, target = random_batch(scale=4.0)
    half = logits.to(dtype)
    value = LOSSES[name](half, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        LOSSES[name](half.double(), target).item(), rel=1e-2 if name == "elr" else 1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_float64_stays_float64_and_autocast_changes_nothing(name):
    logits, target = random_batch()
    assert LOSSES[name](logits, target).dtype == torch.float64
    plain = LOSSES[name](logits.float(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LOSSES[name](logits.float(), target).item() == pytest.approx(plain.item(), rel=1e-6)
