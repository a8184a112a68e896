"""Selection of clean samples, and memorisation of wrong labels."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from lightning_kd.metrics import memorisation, selection_metrics

CLEAN = torch.tensor([0, 1, 2, 0, 1, 2])
GIVEN = torch.tensor([0, 1, 2, 1, 2, 2])  # 0, 1, 2 and 5 are clean


def test_selection_metrics_equal_worked_numbers() -> None:
    score = torch.tensor([0.9, 0.2, 0.8, 0.7, 0.1, 0.6])
    found = selection_metrics(score, score > 0.5, GIVEN, CLEAN)
    assert found == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "auc": 6 / 8})
    wrong = selection_metrics(score, score > 0.5, GIVEN, CLEAN, positives="wrong")
    assert wrong == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "auc": 6 / 8})
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_metrics_equal_scikit_learn(seed: int, dtype: torch.dtype) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(4, (400,), generator=generator)
    given = torch.where(torch.rand(400, generator=generator) < 0.4, (clean + 1) % 4, clean)
    score = (torch.randn(400, generator=generator) + (given == clean)).mul(3).round().to(dtype)  # many ties
    found = selection_metrics(score, score > 0, given, clean)
    truth, guess = (given == clean).numpy(), (score > 0).numpy()
    assert found["precision"] == pytest.approx(metrics.precision_score(truth, guess), rel=1e-12)
    assert found["recall"] == pytest.approx(metrics.recall_score(truth, guess), rel=1e-12)
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, guess), rel=1e-12)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(truth, score.numpy()), rel=1e-12)


@pytest.mark.parametrize("change", [lambda s: 5 * s - 300, torch.exp, lambda s: s**3, lambda s: 1e8 * s])
def test_auc_is_invariant_under_monotone_maps(change: object) -> None:
    score = torch.linspace(-3, 3, 200, dtype=torch.float64)[torch.randperm(200)]
    clean = torch.zeros(200, dtype=torch.int64)
    given = (torch.rand(200) < 0.3).long()
    selected = torch.ones(200, dtype=torch.bool)
    expected = selection_metrics(score, selected, given, clean)["auc"]
    assert selection_metrics(change(score), selected, given, clean)["auc"] == expected  # type: ignore[operator]


def test_auc_of_a_constant_score_is_a_half() -> None:
    score = torch.full((6,), 0.3)
    assert selection_metrics(score, score > 0, GIVEN, CLEAN)["auc"] == 0.5


@pytest.mark.parametrize(
    ("selected", "given", "undefined"),
    [
        (torch.zeros(6).bool(), GIVEN, {"precision"}),
        (torch.ones(6).bool(), CLEAN, {"auc"}),
        (torch.ones(6).bool(), (CLEAN + 1) % 3, {"recall", "auc"}),
        (torch.zeros(6).bool(), (CLEAN + 1) % 3, {"precision", "recall", "f1", "auc"}),
    ],
)
def test_undefined_values_are_nan_with_a_warning(selected: Tensor, given: Tensor, undefined: set[str]) -> None:
    with pytest.warns(UserWarning, match="not defined"):
        found = selection_metrics(torch.rand(6), selected, given, CLEAN)
    assert {name for name, value in found.items() if math.isnan(value)} == undefined


def test_nan_scores_give_a_nan_auc_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="AUC"):
        assert math.isnan(selection_metrics(torch.full((6,), math.nan), GIVEN == 0, GIVEN, CLEAN)["auc"])


def test_repeated_warning_is_shown_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            memorisation(CLEAN, CLEAN, CLEAN)
    assert len(caught) == 1


def test_memorisation_equals_worked_numbers() -> None:
    predicted = torch.tensor([0, 1, 0, 1, 1, 2])
    assert memorisation(predicted, GIVEN, CLEAN) == {"fitted_clean": 3 / 4, "memorised_wrong": 1 / 2}
    with pytest.warns(UserWarning, match="wrong labels"):
        found = memorisation(predicted, CLEAN, CLEAN)
    assert found["fitted_clean"] == pytest.approx(4 / 6)
    assert math.isnan(found["memorised_wrong"])


def test_wrong_arguments_raise() -> None:
    score = torch.zeros(6)
    with pytest.raises(ValueError, match=r"must all be \[N\], got \[6\], \[5\], \[6\], \[6\]"):
        selection_metrics(score, score[:5] > 0, GIVEN, CLEAN)
    with pytest.raises(ValueError, match=r"^selected must be bool, got torch\.float32"):
        selection_metrics(score, score, GIVEN, CLEAN)
    with pytest.raises(ValueError, match=r"^positives must be 'clean' or 'wrong', got 'x'"):
        selection_metrics(score, score > 0, GIVEN, CLEAN, "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must all be \[N\], got \[6\], \[6\], \[3\]"):
        memorisation(GIVEN, GIVEN, CLEAN[:3])
