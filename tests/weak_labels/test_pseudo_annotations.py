"""The selection of pseudo-annotations: quotas, order, what is never picked, blocks."""

import pytest
import torch

from lightning_kd.weak_labels import (
    annotation_balance,
    annotation_weights,
    class_quotas,
    select_pseudo_annotations,
)
from lightning_kd.weak_labels import pseudo_annotations as module

COUNTS = torch.tensor([47, 31, 24, 21])


def crowd(count=60, annotators=7, classes=4, seed=0):
    """Predictions, and annotations in random cells, about two for each sample, with the class counts ``COUNTS``."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.softmax(2 * torch.randn(count, annotators, classes, generator=generator), 2)
    given = torch.full((count, annotators), -1)
    labels = torch.arange(classes).repeat_interleave(COUNTS)
    cells = torch.randperm(count * annotators, generator=generator)[: len(labels)]
    given.view(-1)[cells] = labels
    return predicted, given


def test_class_quotas_equal_worked_numbers_and_sum_to_the_budget():
    weight = 1 / COUNTS.double()
    assert (weight / weight.sum()).tolist() == pytest.approx([0.149, 0.226, 0.292, 0.333], abs=5e-4)
    assert class_quotas(COUNTS, 40).tolist() == [6, 9, 12, 13]
    assert class_quotas(COUNTS, 40, balance=0).tolist() == [10] * 4
    assert class_quotas(torch.tensor([5, 5, 5]), 11).tolist() == [4, 4, 3]  # ties go to the lower class
    assert class_quotas(torch.tensor([0, 1, 10]), 21).tolist() == [10, 10, 1]  # a count of 0 is taken as 1
    for budget in (0, 1, 7, 100, 9999):
        assert int(class_quotas(torch.tensor([1, 17, 400, 3, 90]), budget, 0.7).sum()) == budget


def selection_with_loops(predicted, given, budget, balance, threshold):
    items, annotators, classes = predicted.shape
    quota = class_quotas(torch.bincount(given[given >= 0], minlength=classes), budget, balance).tolist()
    rows = []
    for c in range(classes):
        cells = [
            (-float(predicted[i, r].max()), i * annotators + r, i, r)
            for i in range(items)
            for r in range(annotators)
            if given[i, r] < 0 and bool((given[:, r] >= 0).any()) and int(predicted[i, r].argmax()) == c
            if float(predicted[i, r].max()) >= threshold
        ]
        rows += [(i, r, c) for *_, i, r in sorted(cells)[: quota[c]]]
    return rows


@pytest.mark.parametrize(("balance", "threshold"), [(1.0, 0.0), (0.0, 0.0), (1.0, 0.8), (2.0, 0.0)])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_selection_equals_a_plain_computation(balance, threshold, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    predicted, given = crowd()
    predicted = (predicted * 20).round() / 20  # so that many values are equal
    given[:, 3] = -1  # an annotator without annotations
    before = given.clone()
    rows = select_pseudo_annotations(predicted, given, 40, balance, threshold)
    assert rows.dtype == torch.int64
    assert [tuple(row) for row in rows.tolist()] == selection_with_loops(predicted, given, 40, balance, threshold)
    assert torch.equal(given, before)
    assert bool((given[rows[:, 0], rows[:, 1]] == -1).all())
    assert len({(i, r) for i, r, _ in rows.tolist()}) == len(rows) > 0
    assert 3 not in rows[:, 1]


def test_balance_makes_the_class_counts_more_equal():
    predicted, given = crowd()

    def counts(balance):
        rows = select_pseudo_annotations(predicted, given, 40, balance)
        return COUNTS + torch.bincount(rows[:, 2], minlength=4)

    assert counts(1.0).tolist() == [53, 40, 36, 34]
    assert counts(0.0).tolist() == [57, 41, 34, 31]
    balanced, plain, start = (annotation_balance(c) for c in (counts(1.0), counts(0.0), COUNTS))
    assert balanced.ratio == pytest.approx(53 / 34)
    assert balanced.ratio < plain.ratio < start.ratio
    assert balanced.distance < plain.distance < start.distance


def test_quota_of_a_class_without_predictions_stays_unused():
    predicted, given = crowd()
    predicted[..., 2] = 0
    rows = select_pseudo_annotations(predicted, given, 40)
    assert torch.bincount(rows[:, 2], minlength=4).tolist() == [6, 9, 0, 13]


def test_selection_is_empty_without_budget_free_cells_or_confidence():
    predicted, given = crowd()
    assert select_pseudo_annotations(predicted, given, 0).shape == (0, 3)
    assert select_pseudo_annotations(predicted, given.clamp(min=0), 40).shape == (0, 3)
    assert select_pseudo_annotations(predicted, given * 0 - 1, 40).shape == (0, 3)
    flat = torch.full_like(predicted, 0.25)
    assert select_pseudo_annotations(flat, given, 40, threshold=0.9).shape == (0, 3)


def test_select_cells_without_quotas_takes_the_most_confident():
    predicted, given = crowd()
    rows = module.select_cells([predicted[:20], predicted[20:]], given, 40, None)
    free = torch.where(given < 0, predicted.max(2).values, -1.0)
    best = free.flatten().sort(descending=True, stable=True).indices[:40]
    assert torch.equal(rows[:, 0] * 7 + rows[:, 1], best)
    assert torch.equal(rows[:, 2], predicted.argmax(2).flatten()[best])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": -1}, "budget must be at least 0, got -1"),
        ({"budget": 2.5}, "budget must be a whole number, got 2.5"),
        ({"balance": -1.0}, "balance must be at least 0, got -1.0"),
        ({"threshold": 1.5}, "threshold must be at least 0 and at most 1, got 1.5"),
        ({"annotations": torch.zeros(60, 6, dtype=torch.int64)}, r"annotations must be \[60, 7\], got \[60, 6\]"),
        ({"annotations": torch.full((60, 7), 4)}, "annotations must be classes from 0 to 3, or -1 for none, got 4"),
        ({"predicted": torch.full((60, 7, 4), float("nan"))}, "predicted must be finite, got NaN or infinity"),
    ],
)
def test_wrong_inputs_raise(change, message):
    predicted, given = crowd()
    with pytest.raises(ValueError, match=message):
        select_pseudo_annotations(**{"predicted": predicted, "annotations": given, "budget": 40, **change})


def test_annotation_weights_have_mean_one_and_favour_rare_classes():
    weight = annotation_weights(COUNTS)
    assert float((weight * COUNTS).sum() / COUNTS.sum()) == pytest.approx(1)
    assert weight.tolist() == sorted(weight.tolist())
    doubled = COUNTS.clone()
    doubled[0] *= 2
    other = annotation_weights(doubled)
    assert float(other[0] / other[1]) == pytest.approx(float(weight[0] / weight[1]) * 2**-0.5)
    assert annotation_weights(COUNTS, 0.0).tolist() == [1.0] * 4
    assert annotation_weights(torch.tensor([0, 4])).tolist() == [2.0, 1.0]
    assert annotation_weights(torch.zeros(3, dtype=torch.int64)).tolist() == [1.0] * 3
