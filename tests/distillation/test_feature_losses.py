"""Losses on feature maps: worked numbers, plain loops, invariances, zero maps, maps of different sizes, errors."""

import pytest
import torch
import torch.nn.functional as F

from lightning_kd.core.stage_features import StageShapes
from lightning_kd.distillation import (
    Regressor,
    ReviewKDLoss,
    angle_loss,
    attention_loss,
    distance_loss,
    hierarchical_context_loss,
    nst_loss,
    pkt_loss,
    similarity_loss,
)

ON_MAPS = [attention_loss, nst_loss, similarity_loss]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_channel(rows):
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def test_attention_and_similarity_loss_give_worked_numbers():
    assert attention_loss(one_channel([[1, 0], [0, 1]]), one_channel([[1, 1], [0, 0]])).item() == pytest.approx(0.25)
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 0], [0, 1]], [[1, 0], [1, 0]]))
    assert similarity_loss(student, teacher).item() == pytest.approx(0.292893, abs=1e-6)
    assert similarity_loss(student[..., None, None], teacher[..., None, None]).item() == pytest.approx(
        0.292893, abs=1e-6
    )


@pytest.mark.parametrize("p", [2, 3])
def test_attention_loss_equals_a_loop_over_samples_and_positions(p):
    s, t = random(2, 3, 2, 4), random(2, 5, 4, 4, seed=1)
    t_small = t.unflatten(2, (2, 2)).mean(3)  # the features are averaged to the smaller size, not the attention maps
    plain = 0.0
    for n in range(2):
        sides = []
        for m in (s, t_small):
            a = torch.stack([(m[n, :, i, j] ** p).sum() / m.shape[1] for i in range(2) for j in range(4)])
            sides.append(a / a.square().sum().sqrt())
        plain += float((sides[0] - sides[1]).square().sum()) / 16
    assert attention_loss(s, t, p).item() == pytest.approx(plain, rel=1e-9)
    assert attention_loss(t, s, p).item() == pytest.approx(plain, rel=1e-9)


# side 4 compares channels; side 2 has so few positions that the loss is computed from Gram matrices over them
@pytest.mark.parametrize(("channels", "others", "side"), [(3, 2, 4), (8, 9, 2)])
def test_nst_loss_and_gradient_equal_a_loop_over_channel_pairs(channels, others, side):
    s, t = random(2, channels, side, side).requires_grad_(), random(2, others, side, side, seed=1)
    assert (2 * side**4 < channels**2 + others**2 + channels * others) == (side == 2)

    def mean_kernel(a, b):
        pairs = [[(x.flatten() @ y.flatten() / x.norm() / y.norm()) ** 2 for x in a for y in b]]
        return torch.stack(pairs[0]).mean()

    plain = sum(mean_kernel(b, b) + mean_kernel(a, a) - 2 * mean_kernel(a, b) for a, b in zip(s, t, strict=True)) / 2
    found = nst_loss(s, t)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, s), torch.autograd.grad(plain, s))
    torch.testing.assert_close(nst_loss(s, F.interpolate(t, scale_factor=2)), plain)


def test_similarity_loss_equals_a_loop_over_sample_pairs():
    s, t = random(3, 2, 4, 4), random(3, 5, 2, 2, seed=1)
    rows = []
    for m in (s, t):
        gram = torch.tensor([[float((a * b).sum()) for b in m] for a in m], dtype=torch.float64)
        rows.append(gram / gram.square().sum(1).sqrt()[:, None])
    assert similarity_loss(s, t).item() == pytest.approx(float((rows[0] - rows[1]).square().sum()) / 9)


def test_hierarchical_context_loss_is_the_weighted_mean_of_its_levels():
    for side, weights in ((1, [1]), (2, [1, 1 / 2]), (4, [1, 1 / 2, 1 / 4]), (8, [1, 1 / 2, 1 / 4, 1 / 8])):
        s, t = random(2, 3, side, side), random(2, 3, side, side, seed=1)
        sides = [side, *(k for k in (4, 2, 1) if k < side)]
        errors = [F.mse_loss(*(F.avg_pool2d(m, side // k) for m in (s, t))).item() for k in sides]
        wanted = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
        assert hierarchical_context_loss(s, t).item() == pytest.approx(wanted)
    with pytest.raises(ValueError, match=r"student_map \[2, 3, 8, 8\] and teacher_map \[2, 3, 4, 4\] must both be"):
        hierarchical_context_loss(random(2, 3, 8, 8), random(2, 3, 4, 4))


@pytest.mark.parametrize("loss", ON_MAPS)
def test_map_losses_ignore_scale_and_order_and_give_the_teacher_no_gradient(loss):
    s, t = random(4, 3, 4, 6).requires_grad_(), random(4, 5, 2, 3, seed=1).requires_grad_()
    value = loss(s, t)
    torch.testing.assert_close(loss(7 * s, t / 3), value)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(s[order], t[order]), value)
    torch.testing.assert_close(loss(s[:, [2, 0, 1]], t), value)
    assert loss(s, s).abs().item() < 1e-9
    value.backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [*ON_MAPS, distance_loss, angle_loss, pkt_loss])
def test_losses_are_computed_in_float32_under_autocast(loss):
    shape = (4, 3, 4, 4) if loss in ON_MAPS else (4, 8)
    s, t = random(*shape).float().requires_grad_(), random(*shape, seed=1).float()
    plain = loss(s, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(s, t)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    half = loss(s.bfloat16(), t.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("loss", ON_MAPS)
@pytest.mark.parametrize("dead", [slice(None), 1])
def test_zero_maps_give_no_nan_and_no_huge_gradient(loss, dead):
    s = random(4, 3, 2, 2).float()
    s[dead] = 0
    s.requires_grad_()
    found = loss(s, random(4, 3, 2, 2, seed=1).float())
    found.backward()
    assert found.isfinite()
    assert s.grad.abs().max() < 100
    if dead != 1 or loss is not similarity_loss:  # similarity_loss may make one zero sample similar to the others
        assert s.grad[dead].abs().sum() == 0


def test_other_teacher_batch_single_image_and_wrong_power_raise():
    for loss in ON_MAPS:
        with pytest.raises(ValueError, match=r"^teacher_map must be \[4, D, h, w\], got \[3, 2, 2, 2\]"):
            loss(random(4, 2, 2, 2), random(3, 2, 2, 2))
    with pytest.raises(ValueError, match="student_map must be of 2 images or more, got 1"):
        similarity_loss(random(1, 3), random(1, 3))
    for p in (0, 1.5, -2):
        with pytest.raises(ValueError, match=r"^p must be"):
            attention_loss(random(2, 2, 2, 2), random(2, 2, 2, 2), p)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((3, 8, 12), (5, 4, 6)),
        ((3, 4, 6), (5, 8, 12)),
        ((3, 7, 6), (5, 4, 6)),
        ((3, 4, 4), (5, 4, 4)),
        ((2, 3, 8, 2), (2, 5, 4, 2)),
    ],
)
def test_regressor_output_has_the_shape_of_the_teacher_map(student, teacher):
    regressor = Regressor(student, teacher)
    out = regressor(random(2, *student[-3:]).float())
    assert out.shape[1:] == teacher[-3:]
    assert out.min() == 0
    kernels = {(8, 12): (3, 3), (4, 6): (4, 4), (7, 6): (4, 1), (4, 4): (1, 1), (8, 2): (5, 1)}
    assert regressor.conv.kernel_size == kernels[student[-2:]]
    assert isinstance(regressor.conv, torch.nn.ConvTranspose2d) == (student[-2:] == (4, 6))


def test_regressor_of_unfitting_shapes_raises():
    with pytest.raises(ValueError, match=r"^student_shape must be as large as teacher_shape \(5, 9, 9\) or half of it"):
        Regressor((3, 4, 4), (5, 9, 9))
    with pytest.raises(ValueError, match=r"^teacher_shape must be \(C, H, W\), got \(5,\)"):
        Regressor((3, 4, 4), (5,))


def test_reviewkd_loss_needs_pooled_features_and_equally_many_maps():
    shapes = StageShapes(((3, 4, 4),), ((3, 4, 4),), None, (6,))
    loss = ReviewKDLoss(shapes, shapes)
    assert [f.conv1[0].in_channels for f in loss.fusions] == [6, 3]
    assert [f.att_conv is None for f in loss.fusions] == [True, False]
    with pytest.raises(ValueError, match="needs the pooled features of both networks"):
        ReviewKDLoss(shapes, shapes._replace(pooled=None))
    with pytest.raises(ValueError, match="as many maps, got 2 and 1"):
        ReviewKDLoss(shapes, shapes._replace(before=()))
