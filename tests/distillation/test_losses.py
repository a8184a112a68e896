"""The losses of KD, DKD and DHKD and gradient alignment: worked numbers, identities and a float64 reference."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lightning_kd.distillation.dhkd import align_gradients, binary_kl_loss, binary_kl_norm_loss
from lightning_kd.distillation.dkd import dkd_loss
from lightning_kd.distillation.kd import kd_loss

STUDENT = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)
TARGET = torch.tensor([0])
LOSSES = {
    "kd": lambda s, t: kd_loss(s, t, 4.0),
    "dkd": lambda s, t: dkd_loss(s, t, torch.arange(len(s)) % s.shape[1], 1.0, 8.0, 4.0),
    "binary_kl": lambda s, t: binary_kl_loss(s, t, 2.0),
    "binary_kl_norm": lambda s, t: binary_kl_norm_loss(s, t, 2.0),
}


def grad(function, student, teacher):
    student = student.clone().requires_grad_()
    function(student, teacher).backward()
    return student.grad


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 0.176848), (4.0, 0.352670)])
def test_kd_worked_numbers(temperature, value):
    assert kd_loss(STUDENT, TEACHER, temperature).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "tckd", "nckd", "kd"), [(1.0, 0.165970, 0.120115, 0.176848), (4.0, 0.292103, 0.124676, 0.352670)]
)
def test_dkd_worked_numbers(temperature, tckd, nckd, kd):
    first = dkd_loss(STUDENT, TEACHER, TARGET, 1.0, 0.0, temperature).item()
    second = dkd_loss(STUDENT, TEACHER, TARGET, 0.0, 1.0, temperature).item()
    assert (first, second) == pytest.approx((tckd, nckd), abs=1e-6)
    teacher_target = (TEACHER / temperature).softmax(1)[0, 0].item()
    assert first + (1 - teacher_target) * second == pytest.approx(kd, abs=1e-6)
    assert dkd_loss(STUDENT, TEACHER, TARGET, 0.5, 2.0, temperature).item() == pytest.approx(0.5 * first + 2 * second)


def test_binary_kl_losses_worked_numbers():
    assert binary_kl_loss(STUDENT, TEACHER, 2.0).item() == pytest.approx(0.206262, abs=1e-6)
    assert binary_kl_norm_loss(STUDENT, TEACHER, 2.0).item() == pytest.approx(0.247438, abs=1e-6)
    gradient = grad(LOSSES["binary_kl_norm"], STUDENT, TEACHER)
    torch.testing.assert_close(gradient, torch.tensor([[-0.244919, 0.244919, 0.0]]).double(), atol=1e-6, rtol=0)


def test_binary_kl_norm_is_exact_for_large_and_small_logits():
    for dtype in (torch.float32, torch.float64):
        far = torch.tensor([[60.0]], dtype=dtype)
        near = torch.tensor([[0.01]], dtype=dtype)
        zero = torch.zeros(1, 1, dtype=dtype)
        assert binary_kl_norm_loss(far, zero, 2.0).item() == pytest.approx(57.2274, abs=1e-3)
        assert grad(LOSSES["binary_kl_norm"], far, zero).item() == pytest.approx(1.0, abs=1e-6)
        for temperature in (0.5, 2.0, 10.0):
            # z^2 / 8, whatever the temperature; a softplus form is off by percents here in float32
            assert binary_kl_norm_loss(near, zero, temperature).item() == pytest.approx(1.25e-5, rel=1e-4)


def test_gradients_of_kd_and_binary_losses_equal_their_formulas():
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = 4.0 * ((s / 4).softmax(1) - (t / 4).softmax(1)) / 5
    torch.testing.assert_close(grad(LOSSES["kd"], s, t), expected)
    for name, scaled in (("binary_kl", 2.0 / 5 * ((s / 2).sigmoid() - (t / 2).sigmoid())),):
        torch.testing.assert_close(grad(LOSSES[name], s, t), scaled)
    torch.testing.assert_close(grad(LOSSES["binary_kl_norm"], s, t), 2.0 / 10 * ((s - t) / 4).tanh())


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_passes_and_loss_is_zero_for_equal_logits(name):
    torch.manual_seed(1)
    s, t = 3 * torch.randn(2, 4, 5, dtype=torch.float64)
    assert gradcheck(lambda x: LOSSES[name](x, t), s.clone().requires_grad_())
    assert LOSSES[name](t, t).item() == pytest.approx(0, abs=1e-12)
    assert grad(LOSSES[name], t, t).abs().max() < 1e-12
    assert LOSSES[name](s, t).item() > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [20.0, 110.0, 1e4, 1e30])
def test_finite_and_right_in_float32_for_large_logits(name, scale):
    torch.manual_seed(2)
    s, t = scale * torch.randn(2, 6, 10)
    value, gradient = LOSSES[name](s, t), grad(LOSSES[name], s, t)
    assert value.isfinite()
    assert gradient.isfinite().all()
    reference = LOSSES[name](s.double(), t.double()).item()
    assert value.item() == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    torch.manual_seed(3)
    s, t = (5 * torch.randn(2, 8, 10)).to(dtype)
    value = LOSSES[name](s, t)
    assert value.dtype == torch.float32
    assert value.item() == LOSSES[name](s.float(), t.float()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert LOSSES[name](s.float(), t.float()).item() == value.item()


def test_losses_ignore_logit_shifts_swaps_and_repeated_samples_as_defined():
    torch.manual_seed(4)
    s, t = torch.randn(2, 4, 6, dtype=torch.float64)
    assert kd_loss(s + 3, t - 2, 4.0).item() == pytest.approx(kd_loss(s, t, 4.0).item())
    target = torch.tensor([0, 5, 2, 2])
    assert dkd_loss(s + 3, t - 2, target, 1, 8, 4.0).item() == pytest.approx(dkd_loss(s, t, target, 1, 8, 4.0).item())
    moved = s.clone()
    moved[torch.arange(4), target] += 1.5
    assert dkd_loss(moved, t, target, 0, 1, 4.0).item() == pytest.approx(dkd_loss(s, t, target, 0, 1, 4.0).item())
    assert binary_kl_norm_loss(s, t, 2.0).item() == pytest.approx(binary_kl_norm_loss(t, s, 2.0).item())
    assert binary_kl_norm_loss(s + 1, t, 2.0).item() != pytest.approx(binary_kl_norm_loss(s, t, 2.0).item())
    assert kd_loss(s.repeat(2, 1), t.repeat(2, 1), 4.0).item() == pytest.approx(kd_loss(s, t, 4.0).item())


def test_dkd_of_two_classes_has_no_non_target_part_and_equals_kd():
    s, t = torch.randn(2, 4, 2)
    target = torch.tensor([0, 1, 1, 0])
    assert dkd_loss(s, t, target, 0.0, 1.0, 4.0).item() == 0
    assert dkd_loss(s, t, target, 1.0, 8.0, 4.0).item() == pytest.approx(kd_loss(s, t, 4.0).item(), rel=1e-5)


def test_different_logit_shapes_raise():
    for function in LOSSES.values():
        with pytest.raises(ValueError, match=r"student_logits \(2, 3\) and teacher_logits \(2, 4\)"):
            function(torch.randn(2, 3), torch.randn(2, 4))


# -- gradient alignment ------------------------------------------------------------------------------------------------

BACKBONE = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5])  # <p, a> = -2
HEADS = torch.tensor([[2.0]]), torch.tensor([0.5, 0.5])


def test_alignment_without_conflict_is_the_sum():
    merged = align_gradients([BACKBONE[0], HEADS[0], None], [BACKBONE[0] * 2, None, HEADS[1]])
    assert torch.equal(merged[0], 3 * BACKBONE[0])
    assert torch.equal(merged[1], HEADS[0])
    assert torch.equal(merged[2], HEADS[1])


def test_alignment_over_all_parameters_includes_the_main_head():
    primary, auxiliary = [BACKBONE[0], HEADS[0], None, None], [BACKBONE[1], None, HEADS[1], None]
    merged = align_gradients(primary, auxiliary)
    square = 1 + 4 + 4  # of the whole vector, main head included
    coefficient = 2 / square
    torch.testing.assert_close(merged[0], BACKBONE[0] * (1 + coefficient) + BACKBONE[1])
    torch.testing.assert_close(merged[1], HEADS[0] * (1 + coefficient))
    assert torch.equal(merged[2], HEADS[1])
    assert merged[3] is None
    dot = (merged[0] * primary[0]).sum() + (merged[1] * primary[1]).sum()
    assert dot.item() == pytest.approx(square)


def test_alignment_over_shared_parameters_leaves_the_heads_unchanged():
    primary, auxiliary = [BACKBONE[0], HEADS[0], None], [BACKBONE[1], None, HEADS[1]]
    merged = align_gradients(primary, auxiliary, [True, False, False])
    torch.testing.assert_close(merged[0], BACKBONE[0] * (1 + 2 / 5) + BACKBONE[1])
    assert torch.equal(merged[1], HEADS[0])
    assert torch.equal(merged[2], HEADS[1])
    assert (merged[0] * primary[0]).sum().item() == pytest.approx(5)


def test_alignment_of_zero_and_missing_gradients():
    merged = align_gradients([torch.zeros(2), None], [BACKBONE[1], None])
    assert torch.equal(merged[0], BACKBONE[1])
    assert merged[1] is None
    assert align_gradients([], []) == []
    assert align_gradients([None], [None]) == [None]


def test_alignment_changes_no_input_and_accepts_any_memory_layout():
    torch.manual_seed(0)
    primary = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    auxiliary = -primary + 0.1 * torch.randn(4, 3, 3, 3)
    before = primary.clone(), auxiliary.clone()
    (merged,) = align_gradients([primary], [auxiliary])
    flat = align_gradients([primary.contiguous().flatten()], [auxiliary.contiguous().flatten()])[0]
    torch.testing.assert_close(merged.contiguous().flatten(), flat)
    assert torch.equal(primary, before[0])
    assert torch.equal(auxiliary, before[1])
    assert math.isclose((merged * primary).sum().item(), primary.square().sum().item(), rel_tol=1e-4)


def test_alignment_of_unequal_lengths_raises():
    with pytest.raises(ValueError, match="of one length, got 1, 2, 1"):
        align_gradients([None], [None, None])
