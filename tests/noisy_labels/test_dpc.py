"""The functions of DPC against worked numbers and other ways to compute them."""

import math

import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from lightning_kd.noisy_labels.dpc import (
    DPC,
    calibrated_softmax,
    clean_probability,
    consistency_loss,
    dirichlet_kl,
    dirichlet_nll,
    excess_kurtosis,
    logit_margin,
)

ROWS = torch.tensor([[0.0, 2.0, 0.0, 0.0], [-2.0, 0.0, -2.0, -2.0]], dtype=torch.float64)
TARGET = torch.tensor([1, 1])


def test_softmax_nll_and_kl_give_worked_numbers():
    torch.testing.assert_close(
        calibrated_softmax(ROWS, 1.0)[:, 1], torch.tensor([0.583016, 0.369959], dtype=torch.float64), atol=1e-6, rtol=0
    )
    nll, kl = dirichlet_nll(ROWS, TARGET, 1.0), dirichlet_kl(ROWS, TARGET, 1.0)
    torch.testing.assert_close(nll, torch.tensor([0.539540, 0.994363], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(kl, torch.tensor([0.437492, 0.0182035], dtype=torch.float64), atol=1e-6, rtol=0)


def test_warmup_weights_the_kl_by_beta_over_the_number_of_classes():
    task = DPC("mlp_8", 4, input_shape=(4,), gamma=1.0, beta=0.5)
    terms = task.warmup_terms(ROWS, TARGET)
    assert terms["nll"].item() == pytest.approx((0.539540 + 0.994363) / 2, abs=1e-6)
    assert terms["kl"].item() == pytest.approx(0.5 / 4 * (0.437492 + 0.0182035) / 2, abs=1e-6)
    assert terms.keys() == {"nll", "kl"}


@pytest.mark.parametrize(("classes", "gamma", "scaled"), [(10, 1.0, 0.0568823), (100, 0.1, 0.405168)])
def test_zero_logits_give_worked_losses_and_gradients(classes, gamma, scaled):
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    kl = 0.5 / classes * dirichlet_kl(logits, torch.tensor([3]), gamma)
    assert kl.item() == pytest.approx(scaled, abs=1e-6)
    if classes == 10:
        (gradient,) = torch.autograd.grad(kl.sum(), logits)
        expected = torch.full((10,), 0.00792830, dtype=torch.float64)
        expected[3] = 0
        torch.testing.assert_close(gradient[0], expected, atol=1e-8, rtol=0)
        nll = dirichlet_nll(logits, torch.tensor([3]), gamma)
        assert nll.item() == pytest.approx(math.log(10))
        (gradient,) = torch.autograd.grad(nll.sum(), logits)
        expected = torch.full((10,), 0.05, dtype=torch.float64)
        expected[3] = -0.45
        torch.testing.assert_close(gradient[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("z", "scaled", "slope"),
    [
        (5, 0.981887, 0.399976),
        (10, 3.179399, 0.449623),
        (20, 7.679022, 0.45),
        (40, 16.679022, 0.45),
        (88, 38.279022, 0.45),
    ],
)
def test_one_large_wrong_logit_gives_worked_kl_and_gradient(z, scaled, slope, dtype):
    logits = torch.zeros(1, 10, dtype=dtype)
    logits[0, 2] = z
    logits.requires_grad_()
    kl = 0.05 * dirichlet_kl(logits, torch.tensor([0]), 1.0)
    assert kl.item() == pytest.approx(scaled, abs=5e-6)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert gradient[0, 2].item() == pytest.approx(slope, abs=1e-6)
    assert gradient[0, 0] == 0


def test_dirichlet_kl_equals_that_of_torch_distributions():
    logits = torch.randn(64, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    target = torch.arange(64) % 7
    for gamma in (0.1, 1.0, 3.0):
        alpha = (logits.exp() / gamma + 1).scatter(1, target[:, None], 1.0)
        expected = kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha)))
        torch.testing.assert_close(dirichlet_kl(logits, target, gamma), expected, atol=1e-10, rtol=1e-10)


def test_kl_is_0_without_evidence_for_wrong_classes():
    logits = torch.full((1, 5), float("-inf"), dtype=torch.float64)
    logits[0, 2] = 4.0
    logits.requires_grad_()
    kl = dirichlet_kl(logits, torch.tensor([2]), 1.0)
    assert kl.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(kl.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_of_extreme_logits_are_finite(dtype):
    logits = (torch.linspace(-110, 110, 50)[:, None] * torch.tensor([1.0, -1.0, 0.5])).to(dtype).requires_grad_()
    target = torch.arange(50) % 3
    for function in (dirichlet_nll, dirichlet_kl):
        values = function(logits, target, 10 / 3)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        assert (values >= -1e-6).all()
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert gradient.isfinite().all()
    p = calibrated_softmax(logits, 10 / 3)
    torch.testing.assert_close(p.sum(1), torch.ones(50))


def test_dirichlet_kl_in_float32_agrees_with_float64():
    logits = (torch.rand(2000, 10, generator=torch.Generator().manual_seed(1)) * 220 - 110).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    target = torch.arange(2000) % 10
    kl, expected = dirichlet_kl(logits, target, 1.0), dirichlet_kl(wide, target, 1.0)
    torch.testing.assert_close(kl.double(), expected, atol=5e-6, rtol=5e-7)
    ours, theirs = (torch.autograd.grad(v.sum(), w)[0] for v, w in ((kl, logits), (expected, wide)))
    torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=5e-7)


def test_gradcheck_passes_for_kl_and_nll():
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, 0] = math.log(1000.0)  # near where the series expansion takes over
    logits.requires_grad_()
    target = torch.tensor([1, 2, 3, 4])
    assert torch.autograd.gradcheck(lambda z: dirichlet_kl(z, target, 1.0), logits)
    assert torch.autograd.gradcheck(lambda z: dirichlet_nll(z, target, 0.3), logits)


def test_calibrated_softmax_tends_to_softmax_and_depends_on_shifts():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(calibrated_softmax(logits, 1e-12), logits.softmax(1))
    assert (calibrated_softmax(logits, 1.0) - calibrated_softmax(logits + 1, 1.0)).abs().max() > 0.01
    low = calibrated_softmax(logits - 800, 1.0)
    torch.testing.assert_close(low, torch.full_like(low, 0.25))
    with pytest.raises(ValueError, match="gamma"):
        calibrated_softmax(logits, 0.0)


def test_logit_margin_is_the_label_less_the_largest_other_logit():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    margin = logit_margin(logits, torch.tensor([0, 1, 2]))
    assert margin.tolist() == [1.0, -2.0, -1.0]
    assert logit_margin(logits + 7, torch.tensor([0, 1, 2])).tolist() == margin.tolist()
    assert logit_margin(logits.half(), torch.tensor([0, 1, 2])).dtype == torch.float32


def test_clean_probability_separates_two_groups_and_ignores_scale():
    generator = torch.Generator().manual_seed(0)
    margins = torch.cat([torch.randn(400, generator=generator) - 4, torch.randn(600, generator=generator) + 4])
    w = clean_probability(margins)
    assert w.dtype == torch.float64
    assert (w[:400] < 0.5).float().mean() > 0.99
    assert (w[400:] > 0.5).float().mean() > 0.99
    torch.testing.assert_close(clean_probability(margins.double() * 3 + 5), w, atol=1e-9, rtol=0)
    with pytest.warns(UserWarning, match="same score"):
        assert clean_probability(torch.full((5,), 2.0)).tolist() == [1.0] * 5
    for bad, message in ((torch.tensor([0.0, float("nan")]), "finite"), (torch.empty(0), "N above 0")):
        with pytest.raises(ValueError, match=message):
            clean_probability(bad)


def test_one_outlier_needs_the_clip():
    generator = torch.Generator().manual_seed(0)
    margins = torch.cat([torch.randn(750, generator=generator) - 4, torch.randn(749, generator=generator) + 4])
    margins = torch.cat([margins, torch.tensor([500.0])])
    assert (clean_probability(margins) > 0.5).sum() == 1
    assert 700 < (clean_probability(margins, clip=0.01) > 0.5).sum() < 800


def test_consistency_gradient_reaches_the_strong_view_alone():
    strong = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weak = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = consistency_loss(strong, weak, 1.0)
    loss.backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0
    assert consistency_loss(weak, weak, 1.0).item() == pytest.approx(0, abs=1e-7)


def test_excess_kurtosis_of_known_distributions():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert excess_kurtosis(values) == pytest.approx(0, abs=0.05)
    assert excess_kurtosis(torch.tensor([0.0, 1.0] * 50)) == pytest.approx(-2)
    assert excess_kurtosis(torch.zeros(5)) == 0.0
