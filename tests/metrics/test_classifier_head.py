"""Closed forms of the classifier's flatness, and neural collapse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.metrics.classifier_head import feature_hessian_trace, neural_collapse, relative_flatness

# the worked example of the minimum-norm shift: two features, one weight before and after, one bias
FEATURE = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
BEFORE = torch.tensor([[1.0, 2, 3], [0, 1, -1]])
AFTER = torch.tensor([[1, 2, 3], [-2 / 3, 1 / 3, -1 / 3]], dtype=torch.float64)
LOGITS = torch.tensor([[4.5, -1.5], [5.5, -0.5]])


@pytest.mark.parametrize(("weight", "trace", "kappa"), [(BEFORE, 0.0443972, 0.0887943), (AFTER, 0.0411085, 0.0822170)])
def test_trace_and_relative_flatness_equal_worked_numbers(weight: Tensor, trace: float, kappa: float) -> None:
    assert feature_hessian_trace(weight, LOGITS) == pytest.approx(trace, abs=6e-8)
    assert relative_flatness(FEATURE, weight, LOGITS) == pytest.approx(kappa, abs=6e-8)


def test_relative_flatness_equals_its_definition_by_hessian_blocks() -> None:
    torch.manual_seed(0)
    feature, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (3, 4), (3,)))
    target = torch.tensor([0, 1, 2, 0, 1])
    hessian = torch.autograd.functional.hessian(lambda w: F.cross_entropy(F.linear(feature, w, bias), target), weight)
    expected = torch.einsum("si,ti,sjtj->", weight, weight, hessian)
    assert relative_flatness(feature, weight, F.linear(feature, weight, bias)) == pytest.approx(float(expected))


def test_trace_of_certain_predictions_is_precise() -> None:
    logits = torch.tensor([[0.0, -60.0]])
    expected = math.exp(-60) * 4  # p (1 - p) |w_0 - w_1|^2
    assert feature_hessian_trace(torch.tensor([[101.0], [99.0]]), logits) == pytest.approx(expected, rel=1e-12)


def test_neural_collapse_is_variation_within_over_between_classes() -> None:
    feature = torch.tensor([[0.0], [2.0], [9.0], [11.0], [10.0]])
    target = torch.tensor([0, 0, 2, 2, 2])
    mean = 32 / 5
    assert neural_collapse(feature, target, 3) == pytest.approx(4 / (2 * (1 - mean) ** 2 + 3 * (10 - mean) ** 2))
    assert neural_collapse(torch.eye(3)[target], target, 3) == 0
    assert math.isnan(neural_collapse(feature, torch.zeros(5, dtype=torch.int64), 3))


def test_wrong_shapes_and_targets_raise() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[C, D\]"):
        feature_hessian_trace(BEFORE, LOGITS.T[:1].T)
    with pytest.raises(ValueError, match=r"feature must be \[N, D\]"):
        relative_flatness(FEATURE[:1], BEFORE, LOGITS)
    with pytest.raises(ValueError, match=r"in 0\.\.1, got 0\.\.2"):
        neural_collapse(FEATURE, torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="at least one sample"):
        neural_collapse(FEATURE[:0], torch.zeros(0, dtype=torch.int64), 2)
