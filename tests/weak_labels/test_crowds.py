"""Votes, Dawid and Skene's EM, the crowd layer's probabilities and loss, by worked numbers and written-out formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_kd.core.annotations import observed_cells
from lightning_kd.weak_labels import annotator_probabilities, crowd_loss, dawid_skene, majority_vote

SMALL = torch.tensor([[0, 1, -1], [1, 1, 0], [-1, -1, -1], [2, -1, -1]])


def sparse_crowd(count=60, annotators=7, per_item=2, prior=(0.55, 0.25, 0.13, 0.07), seed=0):
    """A sparse, unequal crowd: true classes and annotations."""
    rng = np.random.default_rng(seed)
    true = rng.choice(len(prior), size=count, p=prior)
    given = np.full((count, annotators), -1)
    for i in range(count):
        for r in rng.choice(annotators, per_item, replace=False):
            right = rng.random() < 0.35 + 0.08 * r
            given[i, r] = true[i] if right else rng.integers(len(prior))
    return torch.from_numpy(true), torch.from_numpy(given)


def test_majority_vote_equals_worked_numbers():
    shares = majority_vote(SMALL, 3)
    expected = torch.tensor([[0.5, 0.5, 0], [1 / 3, 2 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(shares, expected)
    assert shares.argmax(1).tolist() == [0, 1, 0, 2]
    assert torch.equal(majority_vote(SMALL.numpy(), 3), shares)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (SMALL - 1, "annotations must be classes from 0 to 2, or -1 for none, got -2 to 1"),
        (SMALL + 1, "annotations must be classes from 0 to 2, or -1 for none, got 0 to 3"),
        (
            SMALL.float(),
            r"annotations must be integers \[N, R\], a column for each annotator, got torch.float32 \[4, 3\]",
        ),
        (SMALL[0], r"annotations must be integers \[N, R\], a column for each annotator, got torch.int64 \[3\]"),
    ],
)
def test_wrong_annotations_raise(annotations, message):
    for function in (majority_vote, dawid_skene):
        with pytest.raises(ValueError, match=message):
            function(annotations, 3)


def dawid_skene_with_loops(given, classes, iterations, eps):
    """Dawid and Skene's EM, computed with loops: posterior and confusion matrices."""
    given = given.tolist()
    annotators = len(given[0])
    posterior = []
    for row in given:
        votes = [row.count(k) for k in range(classes)]
        posterior.append([v / sum(votes) if sum(votes) else 1 / classes for v in votes])
    pi = None
    for _ in range(iterations):
        prior = [sum(t[k] for t in posterior) + eps for k in range(classes)]
        prior = [p / sum(prior) for p in prior]
        pi = np.full((annotators, classes, classes), eps)
        for t, row in zip(posterior, given, strict=True):
            for r, label in enumerate(row):
                if label >= 0:
                    pi[r, :, label] += t
        pi /= pi.sum(2, keepdims=True)
        posterior = []
        for row in given:
            t = [prior[k] * math.prod(pi[r, k, a] for r, a in enumerate(row) if a >= 0) for k in range(classes)]
            posterior.append([v / sum(t) for v in t])
    return np.array(posterior), pi


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_dawid_skene_equals_a_plain_computation(iterations):
    _, given = sparse_crowd()
    given[5] = -1
    found = dawid_skene(given, 4, iterations, 0.03)
    posterior, confusion = dawid_skene_with_loops(given, 4, iterations, 0.03)
    assert np.allclose(found.posterior.numpy(), posterior, atol=1e-12)
    assert np.allclose(found.confusion.numpy(), confusion, atol=1e-12)
    assert np.allclose(found.confusion.sum(2), 1)


def test_dawid_skene_of_perfect_and_of_silent_annotators():
    true = torch.arange(40) % 4
    given = true[:, None].repeat(1, 5)
    given[0] = -1
    posterior, confusion = dawid_skene(given, 4)
    assert posterior[1:].gather(1, true[1:, None]).min() > 0.9999
    prior = posterior.sum(0) + 0.01
    assert torch.allclose(posterior[0], prior / prior.sum(), atol=1e-6)
    assert torch.equal(dawid_skene(given, 4, iterations=0).posterior, majority_vote(given, 4))
    silent = dawid_skene(torch.cat([given, torch.full((40, 1), -1)], 1), 4).confusion[5]
    assert torch.allclose(silent, torch.full((4, 4), 0.25, dtype=torch.float64))
    assert confusion[:, range(4), range(4)].min() > 0.99


def test_dawid_skene_without_annotations_is_uniform():
    posterior, confusion = dawid_skene(SMALL * 0 - 1, 3)
    assert torch.allclose(posterior, torch.full((4, 3), 1 / 3, dtype=torch.float64))
    assert torch.allclose(confusion, torch.full((3, 3, 3), 1 / 3, dtype=torch.float64))


def objective(given, iterations, eps=0.01):
    """Smoothed log-likelihood of the annotations after the M-step of the last iteration."""
    before = dawid_skene(given, 4, iterations - 1, eps)
    confusion = dawid_skene(given, 4, iterations, eps).confusion
    prior = before.posterior.sum(0) + eps
    prior = prior / prior.sum()
    joint = prior.log().expand(len(given), -1).clone()
    for i, r in (given >= 0).nonzero().tolist():
        joint[i] += confusion[r, :, given[i, r]].log()
    return float(joint.logsumexp(1).sum() + eps * (confusion.log().sum() + prior.log().sum()))


def test_dawid_skene_raises_the_likelihood_and_permutes_with_the_classes():
    _, given = sparse_crowd()
    values = [objective(given, k) for k in range(1, 20)]
    assert all(b >= a - 1e-9 for a, b in pairwise(values))
    assert values[-1] > values[0] + 1
    order = torch.tensor([2, 0, 3, 1, -1])  # the last one is for -1
    one, other = dawid_skene(given, 4, 10), dawid_skene(order[given], 4, 10)
    assert torch.allclose(other.posterior[:, order[:4]], one.posterior)
    assert torch.allclose(other.confusion[:, order[:4]][:, :, order[:4]], one.confusion)


def test_dawid_skene_of_many_annotators_does_not_underflow():
    true = torch.arange(6) % 3
    given = torch.where(torch.rand(6, 3000, generator=torch.Generator().manual_seed(0)) < 0.5, true[:, None], 1)
    posterior = dawid_skene(given, 3, 5).posterior
    assert bool(posterior.isfinite().all())
    assert torch.allclose(posterior.sum(1), torch.ones(6, dtype=torch.float64))


def test_dawid_skene_of_few_annotations_is_worse_than_the_vote():
    """It fits their noise, as its docstring says."""
    right = {"vote": [], 50: []}
    for seed in range(5):
        true, given = sparse_crowd(seed=seed)
        right["vote"].append((majority_vote(given, 4).argmax(1) == true).double().mean())
        right[50].append((dawid_skene(given, 4).posterior.argmax(1) == true).double().mean())
    assert sum(right[50]) < sum(right["vote"])


@pytest.mark.parametrize("options", [{"iterations": -1}, {"iterations": 1.5}, {"smoothing": 0.0}])
def test_wrong_iterations_and_smoothing_raise(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dawid_skene(SMALL, 3, **options)


def identities(classes, annotators):
    return torch.eye(classes)[..., None].repeat(1, 1, annotators)


@pytest.mark.parametrize(("classes", "value"), [(4, 0.475367), (8, 0.279708)])
def test_identity_kernels_give_flat_probabilities(classes, value):
    found = annotator_probabilities(torch.eye(classes), identities(classes, 3))
    assert found.shape == (classes, classes, 3)
    assert found[range(classes), range(classes)].flatten().tolist() == pytest.approx([value] * classes * 3, abs=1e-6)
    assert value == pytest.approx(math.e / (math.e + classes - 1), abs=1e-6)


def test_rows_of_the_kernel_are_true_classes():
    kernel = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    score = [sum(float(p[0, k]) * float(kernel[k, c, 1]) for k in range(3)) for c in range(3)]
    expected = [math.exp(s) / sum(map(math.exp, score)) for s in score]
    assert annotator_probabilities(p, kernel)[0, :, 1].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"kernel must be \[3, 3, R\], got \[3, 2, 2\]"):
        annotator_probabilities(p, kernel[:, :2])


def test_crowd_loss_and_its_two_means_equal_a_plain_computation():
    predicted = torch.softmax(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)), 1)
    given = torch.tensor([[0, -1, 2, 1], [-1] * 4, [2, -1, -1, 0], [1, -1, 0, -1], [-1, -1, 1, -1]])
    cells = (given >= 0).nonzero().tolist()
    total = -sum(math.log(predicted[i, given[i, r], r]) for i, r in cells)
    assert float(crowd_loss(predicted, given)) == pytest.approx(total / len(cells))
    assert float(crowd_loss(predicted, given, per_annotation=False)) == pytest.approx(total / 20)
    assert float(crowd_loss(predicted, given)) == pytest.approx(
        float(crowd_loss(predicted, given, per_annotation=False)) * 20 / len(cells)
    )


def test_missing_annotations_do_not_count_in_loss_and_gradient():
    kernel = identities(3, 4).requires_grad_()
    p = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), 1)
    given = torch.tensor([[0, -1, 2, 1]] * 5)
    crowd_loss(annotator_probabilities(p, kernel), given).backward()
    assert bool((kernel.grad[..., 1] == 0).all())
    assert all(bool((kernel.grad[..., r] != 0).any()) for r in (0, 2, 3))
    predicted = annotator_probabilities(p, kernel.detach())
    other = predicted.clone()
    other[:, :, 1] = predicted[:, :, 1].flip(1)
    assert crowd_loss(predicted, given) == crowd_loss(other, given)
    nothing = crowd_loss(annotator_probabilities(p, kernel), given * 0 - 1)
    nothing.backward()
    assert float(nothing.detach()) == 0


def test_crowd_loss_of_wrong_annotations_raises():
    predicted = torch.full((2, 3, 2), 1 / 3)
    for annotations, message in (
        (torch.zeros(2, 3, dtype=torch.int64), r"annotations must be \[2, 2\], got \[2, 3\]"),
        (torch.full((2, 2), -2), "annotations must be classes from 0 to 2, or -1 for none, got -2 to -2"),
        (torch.full((2, 2), 3), "got 3 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            crowd_loss(predicted, annotations)


def test_mixed_dtypes_are_computed_in_the_wider_one():
    p, kernel = torch.tensor([[0.25, 0.75]]), torch.randn(2, 2, 3, dtype=torch.float64)
    found = annotator_probabilities(p, kernel)
    torch.testing.assert_close(found, annotator_probabilities(p.double(), kernel), rtol=0, atol=0)


def test_dawid_skene_searches_the_annotations_once(monkeypatch):
    calls = []

    def counted(annotations):
        calls.append(annotations)
        return observed_cells(annotations)

    monkeypatch.setattr("lightning_kd.weak_labels.crowd_statistics.observed_cells", counted)
    dawid_skene(torch.tensor([[0, 1, -1], [1, -1, 1]]), 2, 50)
    assert len(calls) == 1
