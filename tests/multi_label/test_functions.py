"""Losses, thresholds and selections of the multi-label methods: worked numbers and plain computations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core.losses import asymmetric_loss
from lightning_kd.data.candidates import candidates_from_uniforms
from lightning_kd.distillation.l2d import (
    class_aware_loss,
    instance_aware_loss,
    multi_label_logits_loss,
    partial_softmax_loss,
)
from lightning_kd.multi_label.cap import pseudo_labels
from lightning_kd.multi_label.cdcr import candidate_thresholds, select_candidates
from lightning_kd.multi_label.pat import aggregate_patches, patch_weights
from lightning_kd.nets.ml_decoder import MLDecoder


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, seed=0, share=0.4):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).double()


# -- the asymmetric loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("y", "loss", "gradient"), [(1.0, 0.693147, -0.5), (0.0, 0.0245151, 0.0186392)])
def test_asymmetric_loss_at_logit_zero_equals_worked_numbers(y, loss, gradient):
    z = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    found = asymmetric_loss(z, double([y]))
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert z.grad.item() == pytest.approx(gradient, abs=1e-6)
    z.grad = None
    asymmetric_loss(z, double([y]), detach_focus=False).backward()
    assert (abs(z.grad.item() - gradient) > 1e-3) == (y == 0)  # gamma_positive is 0


def test_asymmetric_loss_of_easy_negatives_is_zero():
    z = double([-2.95, -2.94, -50.0]).requires_grad_()
    each = asymmetric_loss(z, torch.zeros(1, 3), reduction="none")
    each.sum().backward()
    assert each[0, 0] == each[0, 2] == 0 == z.grad[0, 0] == z.grad[0, 2]
    assert each[0, 1] > 0


def test_asymmetric_loss_without_focus_and_margin_is_binary_cross_entropy():
    z, y = random(5, 4), labels(5, 4)
    found = asymmetric_loss(z, y, 0.0, 0.0, 0.0)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(z, y, reduction="sum"))
    known = y.clone()
    known[1, 2] = -1
    without = asymmetric_loss(z, known, reduction="none")
    assert without[1, 2] == 0
    torch.testing.assert_close(asymmetric_loss(z, known, reduction="mean"), without.sum() / 19)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_asymmetric_loss_and_gradient_of_extreme_logits_are_finite(margin):
    z = torch.tensor([[200.0, -200.0, 200.0, -200.0]], requires_grad=True)
    loss = asymmetric_loss(z, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), margin=margin)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert z.grad[0, 3] == -1  # where a clamp of the probability would leave no gradient
    z.grad = None
    asymmetric_loss(z, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 0.5, 0.5, margin, detach_focus=False).backward()
    assert z.grad.isfinite().all()


# -- L2D -------------------------------------------------------------------------------------------------------------


def test_multi_label_logits_loss_and_gradient_equal_worked_numbers():
    student = double([1.0, -1.0]).requires_grad_()
    loss = multi_label_logits_loss(student, double([2.0, -3.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.236953, abs=1e-6)
    assert student.grad[0].tolist() == pytest.approx([-0.149738, 0.221516], abs=1e-6)
    z, t = random(3, 4), random(3, 4, seed=1)
    total = multi_label_logits_loss(z, t, "sum").item()
    assert multi_label_logits_loss(z, t).item() == pytest.approx(total / 3)
    assert multi_label_logits_loss(z, t, "mean").item() == pytest.approx(total / 12)
    assert multi_label_logits_loss(z, z).item() == 0
    assert multi_label_logits_loss(40 * z, -40 * z).isfinite()


def plain_relation_loss(student, teacher):
    """The relation loss of one group of points, computed pair by pair."""

    def scaled(points):
        d = [[math.dist(a, b) for b in points] for a in points]
        mean = sum(map(sum, d)) / (len(d) * (len(d) - 1))
        return [[x / mean for x in row] for row in d]

    def huber(e):
        return 0.5 * e * e if abs(e) <= 1 else abs(e) - 0.5

    s, t = scaled(student.tolist()), scaled(teacher.tolist())
    return sum(huber(a - b) for x, y in zip(s, t, strict=True) for a, b in zip(x, y, strict=True)) / len(s)


def test_relation_losses_of_three_points_equal_worked_numbers():
    student, teacher = double([0, 0], [3, 0], [0, 4]), double([0, 0], [1, 0], [0, 1])
    assert plain_relation_loss(student, teacher) == pytest.approx(0.010444, abs=1e-6)
    target = torch.ones(3, 1)
    found = class_aware_loss(student[:, None], teacher[:, None], target)
    assert found.item() == pytest.approx(0.010444, abs=1e-6)
    found = instance_aware_loss(student[None], teacher[None], target.T)
    assert found.item() == pytest.approx(0.010444, abs=1e-6)


@pytest.mark.parametrize("at_once", [2**24, 40])
def test_relation_losses_equal_a_plain_computation(at_once, monkeypatch):
    monkeypatch.setattr("lightning_kd.distillation._embedding_distances.AT_ONCE", at_once)
    s, t, y = random(7, 5, 6), random(7, 5, 4, seed=1), labels(7, 5)
    y[:, 3], y[:, 4] = 0, 0
    y[2, 4] = 1  # a label that no image has, and one that a single image has
    plain = sum(plain_relation_loss(s[y[:, k] > 0, k], t[y[:, k] > 0, k]) for k in range(5) if y[:, k].sum() > 1)
    assert class_aware_loss(s, t, y).item() == pytest.approx(plain, rel=1e-9)
    plain = sum(plain_relation_loss(s[i, y[i] > 0], t[i, y[i] > 0]) for i in range(7) if y[i].sum() > 1)
    assert instance_aware_loss(s, t, y).item() == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("loss", [class_aware_loss, instance_aware_loss])
def test_relation_losses_ignore_order_rotation_shift_and_scale(loss):
    s, t, y = random(6, 5, 4), random(6, 5, 4, seed=1), labels(6, 5, share=0.6)
    s.requires_grad_()
    value = loss(s, t, y)
    (gradient,) = torch.autograd.grad(value, s)
    assert (gradient[y == 0] == 0).all()
    assert (gradient[y > 0] != 0).any()
    (tenth,) = torch.autograd.grad(loss(10 * s, t, y), s)  # as the loss ignores the scale of s
    torch.testing.assert_close(tenth, gradient)
    rows, columns = torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(loss(s[rows], t[rows], y[rows]), value)
    torch.testing.assert_close(loss(s[:, columns], t[:, columns], y[:, columns]), value)
    turn = torch.linalg.qr(random(4, 4, seed=2)).Q
    torch.testing.assert_close(loss(s @ turn + 3, t * 5, y), value)
    assert not math.isclose(loss(s[rows], t, y).item(), value.item(), rel_tol=1e-3)


@pytest.mark.parametrize("loss", [class_aware_loss, instance_aware_loss])
def test_relation_losses_without_labels_or_of_equal_points_are_zero(loss):
    s = torch.zeros(3, 3, 4, requires_grad=True)
    for target in (torch.zeros(3, 3), torch.ones(3, 3)):
        found = loss(s, torch.ones(3, 3, 4), target)
        found.backward()
        assert found == 0
        assert (s.grad == 0).all()


def test_partial_softmax_loss_equals_a_plain_computation():
    s, t, y = random(6, 5), random(6, 5, seed=1), labels(6, 5)
    y[0], y[1] = 1, 0  # an image with all labels, and one with none
    s.requires_grad_()
    plain = 0
    for i in range(6):
        absent = (y[i] == 0).nonzero().flatten()
        for k in (y[i] > 0).nonzero().flatten():
            chosen = torch.cat([k[None], absent])
            p, q = (z[i, chosen].log_softmax(0) for z in (t, s))
            plain += (p.exp() * (p - q)).sum() / 6
    found = partial_softmax_loss(s, t, y)
    torch.testing.assert_close(found, plain)
    gradients = [torch.autograd.grad(loss, s)[0] for loss in (found, plain)]
    torch.testing.assert_close(*gradients)
    assert partial_softmax_loss(s, s.detach(), y).item() == pytest.approx(0, abs=1e-12)


def test_ml_decoder_equals_its_layers_written_out_and_keeps_its_queries():
    torch.manual_seed(0)
    head = MLDecoder(6, 5, embedding_dim=16, heads=4, inner_dim=8).eval()
    queries = head.queries.clone()
    logits, embeddings = head(torch.randn(3, 6, 4, 4))
    assert (logits.shape, embeddings.shape) == ((3, 5), (3, 5, 16))
    torch.testing.assert_close(logits, (embeddings * head.weight).sum(2) + head.bias)
    x = torch.randn(2, 6, 4, 4)
    before, embeddings = head(x)
    torch.testing.assert_close(head(x.flatten(2).transpose(1, 2))[0], before)  # tokens
    head.weight.data[1] += 1
    after = head(x)[0]
    assert (after != before).any(0).tolist() == [False, True, False, False, False]
    torch.testing.assert_close(after[:, 1], before[:, 1] + embeddings[:, 1].sum(1))
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    head.train()(x)[0].sum().backward()
    optimizer.step()
    assert torch.equal(head.queries, queries)
    # the layer written out
    head.eval()
    tokens = head.embed(x.flatten(2).transpose(1, 2)).relu()
    q = head.norm1(2 * head.queries.expand(2, -1, -1))
    q = head.norm2(q + head.attention(q, tokens, tokens)[0])
    q = head.norm3(q + head.linear2(head.linear1(q).relu()))
    torch.testing.assert_close(head(x)[1], q)


# -- PAT -------------------------------------------------------------------------------------------------------------


def test_patch_weights_and_aggregation_equal_worked_numbers():
    attention, value = double(2, -1)[:, None, None], double(3, -2)[:, None, None]
    assert patch_weights(attention).flatten().tolist() == pytest.approx([0.952574, 0.047426], abs=1e-6)
    assert aggregate_patches(attention, value).item() == pytest.approx(2.762871, abs=1e-6)
    assert aggregate_patches(attention, attention).item() == pytest.approx(1.857722, abs=1e-6)
    a, v = random(4, 3, 5).requires_grad_(), random(4, 3, 5, seed=1).requires_grad_()
    found = aggregate_patches(a, v)
    torch.testing.assert_close(aggregate_patches(a + random(1, 3, 5, seed=2), v), found)
    torch.testing.assert_close(aggregate_patches(a.flip(0), v.flip(0)), found)
    torch.testing.assert_close(aggregate_patches(torch.zeros_like(a), v), v.mean(0))
    assert (found >= v.amin(0)).all()
    assert (found <= v.amax(0)).all()
    by_attention, by_value = torch.autograd.grad(found.sum(), (a, v))
    w = patch_weights(a)
    torch.testing.assert_close(by_value, w, rtol=0, atol=1e-10)
    torch.testing.assert_close(by_attention, w * (v - found), rtol=0, atol=1e-10)


# -- CAP -------------------------------------------------------------------------------------------------------------

TEN = double(0.95, 0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)[:, None]


def test_pseudo_labels_take_the_share_and_mask_the_likeliest_negative():
    found = pseudo_labels(TEN, torch.tensor([0.3]))
    assert found.threshold.item() == pytest.approx(0.8)
    assert found.label.flatten().tolist() == [1] * 3 + [0] * 7
    assert found.mask.flatten().tolist() == [True] * 3 + [False] + [True] * 6


def test_pseudo_labels_for_shares_of_zero_and_one():
    none = pseudo_labels(TEN, torch.tensor([0.0]))
    assert none.label.sum() == 0
    assert none.threshold.isinf().all()
    assert none.mask.sum() == 9  # the likeliest negative is left out
    every = pseudo_labels(TEN, torch.tensor([1.0]))
    assert every.label.all()
    assert every.mask.all()


def test_pseudo_labels_of_several_classes_and_kept_shares():
    scores, shares = random(1000, 6), torch.tensor([0.0, 0.001, 0.1, 0.29, 0.5, 0.9])
    whole = pseudo_labels(scores, shares)
    assert whole.label.sum(0).tolist() == [0, 1, 100, 290, 500, 900]
    torch.testing.assert_close(pseudo_labels(scores.sigmoid(), shares).label, whole.label)
    for positive, negative in ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5)):
        part = pseudo_labels(scores, shares, positive, negative)
        assert torch.equal(part.label, whole.label)
        assert (part.mask <= whole.mask).all()
        sure = (part.mask & (part.label > 0)).sum(0)
        assert sure.tolist() == [math.floor(positive * k + 1e-9) for k in (0, 1, 100, 290, 500, 900)]
        doubtful = (part.mask & (part.label == 0)).sum(0)
        kept = [math.floor(min(negative, 0.998) * (1000 - k) + 1e-6) for k in (0, 1, 100, 290, 500, 900)]
        assert doubtful.tolist() == kept


def test_number_of_pseudo_labels_is_rounded_down_without_float_errors():
    scores = random(120_000, 1)
    nearly, whole = double(119_999.98 / 120_000), torch.tensor([0.29])
    assert pseudo_labels(scores, nearly).label.sum() == 119_999
    for shares in (whole, double(0.29)):
        assert pseudo_labels(scores[:100], shares).label.sum() == 29


def test_pseudo_labels_of_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"proportions must be in \[0, 1\]"):
        pseudo_labels(TEN, torch.tensor([1.5]))
    with pytest.raises(ValueError, match="keep_positive must be at least 0 and at most 1, got 2"):
        pseudo_labels(TEN, torch.tensor([0.5]), 2)
    with pytest.raises(ValueError, match="scores must be finite"):
        pseudo_labels(TEN * math.nan, torch.tensor([0.5]))


def test_pseudo_labels_of_half_precision_equal_those_of_float32():
    for dtype in (torch.float16, torch.bfloat16):
        found = pseudo_labels((4 * TEN).round().to(dtype), torch.tensor([0.3]))
        whole = pseudo_labels((4 * TEN).round().float(), torch.tensor([0.3]))
        assert torch.equal(found.label, whole.label)
        assert torch.equal(found.mask, whole.mask)
        assert torch.equal(found.threshold, whole.threshold)


# -- CDCR ------------------------------------------------------------------------------------------------------------

CONFIDENCE, CANDIDATES = double([0.9, 0.3], [0.7, 0.2], [0.2, 0.6]), torch.tensor([[1, 1], [1, 0], [0, 1]])


def test_selected_candidates_and_thresholds_equal_worked_numbers():
    assert select_candidates(CONFIDENCE, CANDIDATES, 0.6).tolist() == [[True, False], [True, True], [True, True]]
    assert candidate_thresholds(CONFIDENCE, CANDIDATES, 0.6, True).tolist() == pytest.approx([0.775, 0.425])
    assert select_candidates(CONFIDENCE, CANDIDATES, 0.6, True).tolist() == [[True, False], [False, True], [True, True]]
    # a class without candidates does not change the others
    more = candidate_thresholds(
        torch.cat([CONFIDENCE, CONFIDENCE[:, :1]], 1), torch.cat([CANDIDATES, 0 * CANDIDATES[:, :1]], 1), 0.6, True
    )
    assert more.tolist() == pytest.approx([0.775, 0.425, 0.6])
    # a confident class raises its own threshold and lowers those of the others
    p, s = random(8, 4).sigmoid(), torch.ones(8, 4)
    shifted = p.clone()
    shifted[:, 1] += 0.04
    moved = candidate_thresholds(shifted, s, 0.6, True) - candidate_thresholds(p, s, 0.6, True)
    assert moved.tolist() == pytest.approx([-0.01, 0.03, -0.01, -0.01])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_candidate_with_a_confidence_of_alpha_is_trusted(dtype):
    for alpha in (0.3, 0.7, 0.9):
        p = torch.tensor([[alpha, alpha - 0.05]], dtype=dtype)
        assert select_candidates(p, torch.ones(1, 2), alpha).tolist() == [[True, False]]


def test_clip_limits_the_thresholds():
    p = double([0.95, 0.1], [0.99, 0.1], [0.97, 0.1])
    wide = candidate_thresholds(p, torch.ones(3, 2), 0.8, True)
    assert wide.tolist() == pytest.approx([1.235, 0.365])
    assert candidate_thresholds(p, torch.ones(3, 2), 0.8, True, clip=True).tolist() == pytest.approx([0.95, 0.365])
    assert not select_candidates(p, torch.ones(3, 2), 0.8, True)[:, 0].any()
    assert select_candidates(p, torch.ones(3, 2), 0.8, True, clip=True)[:, 0].all()


def test_selection_minimizes_the_objective_of_self_paced_learning():
    p = random(2, 2).sigmoid()
    loss, weight = -p.log(), -math.log(0.6)
    choices = torch.cartesian_prod(*[double(0, 1)] * 4).reshape(-1, 2, 2)
    best = choices[((loss - weight) * choices).sum((1, 2)).argmin()]
    assert torch.equal(select_candidates(p, torch.ones(2, 2), 0.6), best > 0)


def test_selection_with_wrong_arguments_raises():
    for change, message in (
        ({"alpha": 1.0}, "alpha must be above 0 and below 1"),
        ({"candidates": CANDIDATES + 1}, "candidates must hold 0 and 1"),
        ({"candidates": CANDIDATES[:2]}, r"candidates must be \[3, 2\]"),
        ({"confidence": CONFIDENCE * math.nan}, "confidence must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            select_candidates(**{"confidence": CONFIDENCE, "candidates": CANDIDATES, "alpha": 0.6, **change})


def test_candidates_from_uniforms_add_false_labels_at_the_given_rate():
    rng = np.random.default_rng(0)
    target = (rng.random((500, 20)) < 0.2).astype(np.uint8)
    uniforms = rng.random(target.shape)
    found = candidates_from_uniforms(target, 0.1, uniforms)
    assert found.dtype == np.uint8
    assert (found >= target).all()
    assert np.array_equal(found[target == 0], (uniforms < 0.1)[target == 0])
    share = found[target == 0].mean()
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / (target == 0).sum())
    assert np.array_equal(candidates_from_uniforms(target, 0.0, uniforms), target)
    one_hot = np.eye(20, dtype=np.uint8)[rng.integers(0, 20, 500)]  # one class an image: partial labels
    found = candidates_from_uniforms(one_hot, 0.3, uniforms)
    assert (found[one_hot == 1] == 1).all()
    assert found.sum(1).mean() == pytest.approx(1 + 19 * 0.3, abs=0.3)
    assert np.array_equal(found, ((uniforms < 0.3) | (one_hot == 1)).astype(np.uint8))
    with pytest.raises(ValueError, match=r"must both be \[N, C\]"):
        candidates_from_uniforms(target, 0.1, uniforms[:3])
    with pytest.raises(ValueError, match="target must hold 0 and 1"):
        candidates_from_uniforms(target * 2, 0.1, uniforms)
