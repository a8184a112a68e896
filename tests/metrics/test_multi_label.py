"""Multi-label metrics: worked numbers, and how the definitions of average precision differ."""

import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.classification import MultilabelF1Score

from lightning_kd.metrics.multi_label import (
    average_precision,
    oracle_count_prediction,
    precision_recall_f1,
    share_prediction,
    top_k_prediction,
)

DEFINITIONS = ("sklearn", "rank", "area", "voc11")


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def random_scores(n=80, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(n, classes, generator=generator) < 0.3).float()
    return torch.randn(n, classes, generator=generator, dtype=torch.float64) + target, target


@pytest.mark.parametrize(
    ("definition", "expected"), [("sklearn", 0.755556), ("rank", 0.755556), ("area", 0.755556), ("voc11", 0.763636)]
)
def test_average_precision_equals_worked_numbers(definition, expected):
    found = average_precision(column(0.9, 0.8, 0.7, 0.6, 0.5), column(1, 0, 1, 0, 1), definition)
    assert found.tolist() == pytest.approx([expected], abs=1e-6)
    assert found.dtype == torch.float64


def test_average_precision_of_equal_scores():
    scores = column(0.5, 0.5, 0.5)
    assert average_precision(scores, column(1, 0, 0)).item() == pytest.approx(1 / 3)
    assert average_precision(scores, column(1, 0, 0), "rank").item() == 1  # the order of the samples decides
    assert average_precision(scores, column(0, 0, 1), "rank").item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_average_precision_of_best_and_worst_order_and_no_positives(definition):
    scores = torch.arange(10, dtype=torch.float64)[:, None]
    assert average_precision(scores, (scores >= 6).double(), definition).item() == 1
    assert average_precision(scores, (scores == 0).double(), definition).item() == pytest.approx(0.1)
    assert average_precision(scores, torch.zeros(10, 1), definition).isnan().all()


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_average_precision_ignores_scale_order_and_unknown_labels(definition):
    scores, target = random_scores()
    found = average_precision(scores, target, definition)
    torch.testing.assert_close(average_precision(scores.sigmoid() * 3 + 1, target, definition), found)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(average_precision(scores[order], target[order], definition), found)
    # an unknown label counts as if the image were left out
    unknown = target.clone()
    unknown[::5, 2] = -1
    keep = unknown[:, 2] >= 0
    assert average_precision(scores, unknown, definition)[2] == pytest.approx(
        average_precision(scores[keep], target[keep], definition)[2].item()
    )
    plain = [plain_average_precision(scores[:, c].tolist(), target[:, c].tolist(), definition) for c in range(6)]
    assert found.tolist() == pytest.approx(plain, abs=1e-12)


def plain_average_precision(scores, target, definition):
    """Average precision of one class, computed sample by sample."""
    labels = [label for _, label in sorted(zip(scores, target, strict=True), reverse=True)]
    positives, hits, points = sum(labels), 0, []
    for rank, label in enumerate(labels, 1):
        hits += label
        points.append((hits / positives, hits / rank, label))
    if definition == "voc11":
        return sum(max(p for r, p, _ in points if r >= t / 10 - 1e-12) for t in range(11)) / 11
    if definition == "area":
        points = [(r, max(q for _, q, _ in points[k:]), label) for k, (r, _, label) in enumerate(points)]
    return sum(p for _, p, label in points if label) / positives


def test_sklearn_definition_equals_scikit_learn_and_area_is_not_below_rank():
    scores, target = random_scores()
    by_name = {name: average_precision(scores, target, name) for name in DEFINITIONS}
    expected = [average_precision_score(target[:, c], scores[:, c]) for c in range(6)]
    assert by_name["sklearn"].tolist() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(by_name["rank"], by_name["sklearn"])
    assert (by_name["area"] >= by_name["rank"]).all()


def test_precision_recall_f1_equal_plain_and_torchmetrics_values():
    scores, target = random_scores()
    prediction = scores > 0.5
    found = precision_recall_f1(prediction, target)
    hits = (prediction & (target == 1)).sum(0)
    cp, cr = (hits / prediction.sum(0)).mean().item(), (hits / target.sum(0)).mean().item()
    assert found[:3] == pytest.approx((cp, cr, 2 * cp * cr / (cp + cr)), rel=1e-6)
    micro = MultilabelF1Score(6, average="micro")(prediction.int(), target.int())
    macro = MultilabelF1Score(6, average="macro")(prediction.int(), target.int())
    assert found.of1 == pytest.approx(micro.item(), rel=1e-6)
    assert abs(found.cf1 - macro.item()) > 1e-4  # cf1 is not the mean of F1 over classes
    assert found.of1 == pytest.approx(2 * found.op * found.or_ / (found.op + found.or_))


def test_empty_option_for_a_class_that_is_never_predicted():
    prediction = torch.tensor([[1, 0], [1, 0], [0, 0]])
    target = torch.tensor([[1, 1], [0, 0], [0, 0]])
    skip, zero = (precision_recall_f1(prediction, target, empty) for empty in ("skip", "zero"))
    assert (skip.cp, zero.cp) == (0.5, 0.25)
    assert skip.cr == zero.cr == 0.5
    assert precision_recall_f1(torch.zeros(2, 2), torch.zeros(2, 2)) == (0, 0, 0, 0, 0, 0)
    # an unknown label is neither right nor wrong
    assert precision_recall_f1(torch.ones(2, 1), torch.tensor([[1], [-1]])).op == 1


def test_top_k_oracle_count_and_share_predictions():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]])
    assert top_k_prediction(scores, 2).tolist() == [[True, True, False], [False, True, True], [False, True, True]]
    target = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    assert oracle_count_prediction(scores, target).tolist() == [[True, True, False], [False] * 3, [True] * 3]
    shares = torch.tensor([1 / 3, 0.0, 1.0])
    assert share_prediction(scores, shares).tolist() == [
        [True, False, True],
        [False, False, True],
        [False, False, True],
    ]
    hundred = torch.arange(100.0)[:, None]
    assert share_prediction(hundred, torch.tensor([0.29])).sum() == 29  # though int(0.29 * 100) is 28


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: average_precision(s, t, "binned"), "definition must be"),
        (lambda s, t: average_precision(s, t[:2]), r"target must be \[4, 3\]"),
        (lambda s, t: average_precision(s, t + 1), "target must hold -1 and 0 and 1"),
        (lambda s, t: precision_recall_f1(s > 0, t, "nan"), "empty must be"),
        (lambda s, t: precision_recall_f1(s, t), "prediction must hold 0 and 1"),
        (lambda s, t: top_k_prediction(s, 4), "k must be from 1 to 3, got 4"),
        (lambda s, t: oracle_count_prediction(s, t - 1), "target must hold 0 and 1"),
        (lambda s, t: share_prediction(s, torch.tensor([0.1, 0.2, 1.2])), r"shares must be in \[0, 1\]"),
    ],
)
def test_wrong_arguments_raise(call, message):
    scores, target = random_scores(4, 3)
    with pytest.raises(ValueError, match=message):
        call(scores, target.round())
