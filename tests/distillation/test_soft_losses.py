"""DIST, LSKD and NKD: worked numbers, invariances, label matrices, and the tasks."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_kd.distillation import DIST, DKD, KD, NKD, dist_loss, dkd_loss, kd_loss, nkd_loss, standardize

STUDENT = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)
TARGET = torch.tensor([0])
LOSSES = {
    "dist": lambda s, t: dist_loss(s, t, 1.0, 2.0, 4.0),
    "lskd": lambda s, t: kd_loss(standardize(s), standardize(t), 2.0),
    "nkd": lambda s, t: nkd_loss(s, t, torch.arange(len(s)) % s.shape[1], 3.0, 3.5),
}


def values(seed, rows=5, columns=6):
    return 2 * torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(function, student, teacher):
    student = student.clone().requires_grad_()
    function(student, teacher).backward()
    return student.grad


# -- all losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_passes_and_half_precision_is_computed_in_float32(name):
    function, s, t = LOSSES[name], values(0), values(1)
    assert torch.autograd.gradcheck(lambda x: function(x, t), s.clone().requires_grad_())
    half = s.bfloat16(), t.bfloat16()
    assert function(*half).dtype == torch.float32
    assert function(*half).item() == function(half[0].float(), half[1].float()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert function(s.float(), t.float()).item() == pytest.approx(function(s, t).item(), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_uniform_and_extreme_student_logits_have_bounded_gradients(name):
    for s in (torch.zeros(4, 6), torch.full((4, 6), 0.1), 1e4 * values(2, 4).float()):
        slope = gradient(LOSSES[name], s, values(3, 4).float())
        assert slope.isfinite().all()
        assert slope.abs().max() < 100


# -- LSKD ----------------------------------------------------------------------------------------------------------


def test_standardize_gives_mean_0_and_standard_deviation_1():
    z = standardize(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], dtype=torch.float64))
    torch.testing.assert_close(z, torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double(), atol=1e-6, rtol=0)
    logits = values(4)
    torch.testing.assert_close(standardize(3 * logits - 7), standardize(logits), atol=1e-6, rtol=0)
    assert standardize(logits).std(1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)  # unbiased
    for wrong, message in ((torch.zeros(3), r"logits must be \[B, C\]"), (torch.zeros(3, 1), "at least 2 classes")):
        with pytest.raises(ValueError, match=message):
            standardize(wrong)


def test_lskd_is_kd_of_standardized_logits_and_ignores_affine_maps():
    s, t = values(5), values(6)
    assert LOSSES["lskd"](2 * s + 1, 5 * t - 3).item() == pytest.approx(LOSSES["lskd"](s, t).item(), rel=1e-5)
    assert kd_loss(2 * s + 1, 5 * t - 3, 2.0).item() != pytest.approx(kd_loss(s, t, 2.0).item(), rel=1e-2)
    centred = (s - s.mean(1, keepdim=True)) / (s.var(1, correction=1, keepdim=True).sqrt() + 1e-7)
    taught = (t - t.mean(1, keepdim=True)) / (t.var(1, correction=1, keepdim=True).sqrt() + 1e-7)
    log_s, p = (centred / 2).log_softmax(1), (taught / 2).softmax(1)
    assert LOSSES["lskd"](s, t).item() == pytest.approx(4 * F.kl_div(log_s, p, reduction="batchmean").item())


# -- DIST ----------------------------------------------------------------------------------------------------------


def test_dist_loss_is_one_minus_the_correlations():
    s, t = values(7), values(8)
    p, q = (s / 4).softmax(1), (t / 4).softmax(1)
    rows = torch.stack([torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(5)]).mean()
    columns = torch.stack([torch.corrcoef(torch.stack([p[:, k], q[:, k]]))[0, 1] for k in range(6)]).mean()
    assert dist_loss(s, t, 1.0, 0.0, 4.0).item() == pytest.approx(16 * (1 - rows.item()), rel=1e-5)
    assert dist_loss(s, t, 0.0, 1.0, 4.0).item() == pytest.approx(16 * (1 - columns.item()), rel=1e-4)
    assert dist_loss(s, t, 2.0, 3.0, 4.0).item() == pytest.approx(16 * (5 - 2 * rows.item() - 3 * columns.item()))


def test_dist_loss_is_0_for_affinely_related_probabilities():
    q = values(9).softmax(1)
    p = 0.25 * q + 0.75 / 6  # affine in each row and in each column
    assert dist_loss(p.log(), q.log(), 1.0, 1.0, 1.0).item() == pytest.approx(0, abs=1e-5)
    assert dist_loss(q.log(), q.flip(0).log(), 1.0, 1.0, 1.0).item() > 0.1


def test_dist_loss_of_one_sample_has_a_constant_intra_class_term():
    s, t = values(10, 1), values(11, 1)
    assert dist_loss(s, t, 1.0, 1.0, 2.0).item() == pytest.approx(dist_loss(s, t, 1.0, 0.0, 2.0).item() + 4)
    assert torch.equal(
        gradient(partial(dist_loss, beta=1.0, gamma=1.0, tau=2.0), s, t),
        gradient(partial(dist_loss, beta=1.0, gamma=0.0, tau=2.0), s, t),
    )


# -- NKD -----------------------------------------------------------------------------------------------------------


def test_nkd_worked_numbers():
    assert nkd_loss(STUDENT, TEACHER, TARGET, 1.0, 0.0).item() == pytest.approx(0.370694, abs=1e-6)
    both = nkd_loss(STUDENT, TEACHER, TARGET, 1.0, 1.0).item()
    assert both - 0.370694 == pytest.approx(0.813262, abs=2e-6)
    assert nkd_loss(STUDENT, TEACHER, TARGET, 1.0, 1.5).item() == pytest.approx(1.590587, abs=1e-6)


def test_nkd_loss_equals_a_loop_over_samples():
    s, t, target = values(12), values(13), torch.tensor([0, 5, 2, 2, 3])
    expected = 0.0
    for i, y in enumerate(target.tolist()):
        rest = [k for k in range(6) if k != y]
        expected -= t[i].softmax(0)[y] * s[i].log_softmax(0)[y] / 5
        expected -= 3.5 * 9 * ((t[i, rest] / 3).softmax(0) * (s[i, rest] / 3).log_softmax(0)).sum() / 5
    assert nkd_loss(s, t, target, 3.0, 3.5).item() == pytest.approx(expected.item(), rel=1e-9)


def test_nkd_non_target_term_has_no_target_gradient_and_none_at_equality():
    s, t, target = values(14), values(15), torch.arange(5)
    whole, first = (gradient(lambda a, b, g=g: nkd_loss(a, b, target, 3.0, g), s, t) for g in (3.5, 0.0))
    of_others = whole - first
    assert of_others.gather(1, target[:, None]).abs().max() < 1e-12
    # for equal logits the non-target term has no gradient, the target term still has one
    one_hot = F.one_hot(target, 6)
    expected = t.softmax(1).gather(1, target[:, None]) * (t.softmax(1) - one_hot) / 5
    same = gradient(lambda a, b: nkd_loss(a, b, target, 3.0, 3.5), t, t)
    torch.testing.assert_close(same, expected, atol=1e-12, rtol=0)


def test_nkd_of_two_classes_has_no_non_target_term():
    s, t, target = values(16, 4, 2), values(17, 4, 2), torch.tensor([0, 1, 1, 0])
    assert nkd_loss(s, t, target, 3.0, 9.0).item() == nkd_loss(s, t, target, 3.0, 0.0).item()


def test_nkd_uses_the_largest_entry_of_each_label_matrix_row():
    s, t, target = values(18), values(19), torch.tensor([4, 0, 1, 1, 2])
    mixed = 0.7 * F.one_hot(target, 6).float() + 0.3 * F.one_hot(target.flip(0), 6)
    assert nkd_loss(s, t, mixed, 3.0, 3.5).item() == nkd_loss(s, t, target, 3.0, 3.5).item()
    for wrong in (2 * mixed, mixed - 0.1):
        with pytest.raises(
            ValueError, match=r"values of at least 0 and rows that sum to 1, got values from .* sums from"
        ):
            nkd_loss(s, t, wrong, 3.0, 3.5)
    with pytest.raises(ValueError, match=r"target must be \[5, 6\], got \[5, 4\]"):
        nkd_loss(s, t, mixed[:, :4], 3.0, 3.5)
    with pytest.raises(ValueError, match="target must be int64"):
        nkd_loss(s, t, F.one_hot(target, 6), 3.0, 3.5)


# -- tasks ---------------------------------------------------------------------------------------------------------


def batches(mixed=False):
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    target = 0.6 * F.one_hot(y, 3).float() + 0.4 * F.one_hot(y.flip(0), 3) if mixed else y
    return DataLoader(list(zip(x, target, strict=True)), 8)


def run(method, mixed=False, **options):
    """Logged metrics of an epoch at learning rate 0; student logits, teacher logits and targets of its batches."""
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    still = partial(torch.optim.SGD, lr=0.0)
    trainer.fit(method(student, teacher, 3, input_shape=(4,), optimizer=still, **options), batches(mixed))
    with torch.no_grad():
        parts = [(student(x), teacher(x), y) for x, y in batches(mixed)]
    return trainer.callback_metrics, parts


@pytest.mark.parametrize(
    ("method", "options", "ce", "kd"),
    [
        (DIST, {}, 1.0, lambda s, t, y: dist_loss(s, t, 1.0, 1.0, 1.0)),
        (
            DIST,
            {"tau": 4.0, "beta": 2.0, "gamma": 3.0, "kd_weight": 2.0},
            1.0,
            lambda s, t, y: 2 * dist_loss(s, t, 2, 3, 4),
        ),
        (NKD, {}, 1.0, lambda s, t, y: nkd_loss(s, t, y, 3.0, 3.5)),
        (
            KD,
            {"standardize": True, "temperature": 2.0, "kd_weight": 9.0},
            0.1,
            lambda s, t, y: 9 * kd_loss(standardize(s), standardize(t), 2.0),
        ),
        (
            DKD,
            {"standardize": True, "warmup_epochs": 2},
            1.0,
            lambda s, t, y: 0.5 * dkd_loss(standardize(s), standardize(t), y, 1.0, 8.0, 4.0),
        ),
    ],
)
def test_tasks_add_their_loss_to_cross_entropy(method, options, ce, kd):
    metrics, parts = run(method, **options)
    assert float(metrics["train/loss_ce"]) == pytest.approx(
        sum(ce * F.cross_entropy(s, y).item() for s, t, y in parts) / 2, rel=1e-5
    )
    assert float(metrics["train/loss_kd"]) == pytest.approx(sum(kd(*part).item() for part in parts) / 2, rel=1e-5)


def test_nkd_trains_on_mixed_images():
    metrics, parts = run(NKD, mixed=True)
    assert float(metrics["train/loss_ce"]) == pytest.approx(
        sum(-(y * s.log_softmax(1)).sum(1).mean().item() for s, t, y in parts) / 2, rel=1e-5
    )
    assert float(metrics["train/loss_kd"]) == pytest.approx(
        sum(nkd_loss(s, t, y.argmax(1), 3.0, 3.5).item() for s, t, y in parts) / 2, rel=1e-5
    )
    right = torch.cat([s.argmax(1) == y.argmax(1) for s, t, y in parts]).float().mean()
    assert float(metrics["train/acc"]) == pytest.approx(right.item())


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (DIST, {"tau": 0.0}, "tau must be above 0, got 0.0"),
        (DIST, {"beta": -1.0}, "beta must be at least 0, got -1.0"),
        (NKD, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (NKD, {"gamma": -1.0}, "gamma must be at least 0, got -1.0"),
    ],
)
def test_wrong_arguments_raise(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(nn.Linear(4, 3), nn.Linear(4, 3), 3, input_shape=(4,), **arguments)
