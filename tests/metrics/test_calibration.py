"""Reliability diagrams."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_kd.core.calibration import reliability_sums
from lightning_kd.metrics import Reliability, reliability


def test_ece_of_certain_and_right_predictions_is_zero() -> None:
    found = reliability(torch.eye(4), torch.arange(4))
    assert found.ece == 0
    assert found.share.tolist() == [0.0] * 14 + [1.0]
    assert found.accuracy[:14].isnan().all()
    assert (found.accuracy[14].item(), found.confidence[14].item()) == (1, 1)


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_ece_of_uniform_predictions(classes: int) -> None:
    target = torch.arange(classes).repeat(5)
    found = reliability(torch.full((5 * classes, classes), 1 / classes), target)
    assert found.ece == pytest.approx(0, abs=1e-7)  # ties go to class 0: accuracy 1 / C
    assert reliability(torch.full((5, classes), 1 / classes), torch.zeros(5).long()).ece == pytest.approx(
        1 - 1 / classes
    )


@pytest.mark.parametrize("bins", [10, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ece_equals_torchmetrics(bins: int, dtype: torch.dtype) -> None:
    probabilities = (2 * torch.randn(500, 6)).softmax(1).to(dtype)
    target = torch.randint(6, (500,))
    theirs = multiclass_calibration_error(probabilities.float(), target, 6, n_bins=bins, norm="l1")
    found = reliability(probabilities, target, bins)
    assert found.ece == pytest.approx(theirs.item(), rel=1e-5)
    assert found.share.sum().item() == pytest.approx(1)
    filled = found.share > 0
    total = (found.share * found.accuracy)[filled].sum()
    assert total.item() == pytest.approx((probabilities.argmax(1) == target).double().mean().item())


def test_confidence_on_a_bin_border_counts_in_the_bin_below() -> None:
    found = reliability(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.2, 0.8], [0, 1]]), torch.zeros(4).long(), bins=4)
    assert found.share.tolist() == [0, 0.25, 0.25, 0.5]


def test_sums_of_batches_give_the_reliability_of_all_samples() -> None:
    probabilities, target = torch.randn(60, 3).softmax(1), torch.randint(3, (60,))
    sums = reliability_sums(probabilities[:17], target[:17]) + reliability_sums(probabilities[17:], target[17:])
    torch.testing.assert_close(Reliability.from_sums(sums), reliability(probabilities, target), equal_nan=True)


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r"^probabilities must be \[N, C\] and target \[N\], got \[4\] and \[4\]"):
        reliability(torch.zeros(4), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"^bins must be at least 1, got 0"):
        reliability(torch.eye(2), torch.arange(2), bins=0)
    with pytest.raises(ValueError, match="at least one sample"):
        reliability(torch.zeros(0, 3), torch.zeros(0).long())
