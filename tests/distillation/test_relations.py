"""The losses of RKD and PKT: worked numbers, a plain loop, invariances, equal or zero features, errors."""

import math

import pytest
import torch

from lightning_kd.distillation import angle_loss, distance_loss, pkt_loss

LOSSES = [distance_loss, angle_loss, pkt_loss]
STUDENT = torch.tensor([[0.0, 0], [3, 0], [0, 4]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 0], [1, 0], [0, 1]], dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_give_worked_numbers():
    assert distance_loss(STUDENT, TEACHER).item() == pytest.approx(0.00348125, abs=1e-8)
    assert angle_loss(STUDENT, TEACHER).item() == pytest.approx(0.00074448, abs=1e-8)
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 0], [0, 1]], [[1, 0], [1, 0]]))
    assert pkt_loss(student, teacher).item() == pytest.approx(0.0294457, abs=1e-7)


def test_angle_loss_equals_a_loop_over_triples_whole_and_in_parts(monkeypatch):
    s, t = random(5, 3).requires_grad_(), random(5, 4, seed=1)

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return 0.0 if i in (j, k) else float(a @ b) / math.dist(x[j], x[i]) / math.dist(x[k], x[i])

    plain = 0.0
    for i in range(5):
        for j in range(5):
            for k in range(5):
                e = abs(cosine(s.detach(), i, j, k) - cosine(t, i, j, k))
                plain += (0.5 * e * e if e < 1 else e - 0.5) / 125
    whole = angle_loss(s, t)
    assert whole.item() == pytest.approx(plain, rel=1e-9)
    (gradient,) = torch.autograd.grad(whole, s)
    monkeypatch.setattr("lightning_kd.distillation.rkd.AT_ONCE", 50)
    parts = angle_loss(s, t)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, s)[0], gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_ignore_scale_and_order_and_give_the_teacher_no_gradient(loss):
    s, t = random(6, 3), random(6, 4, seed=1).requires_grad_()
    value = loss(s.requires_grad_(), t)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(loss(s[order], t[order]), value)
    torch.testing.assert_close(loss(4 * s, t), value, rtol=1e-5, atol=0)
    assert not math.isclose(loss(s[order], t).item(), value.item(), rel_tol=1e-3)
    assert loss(s, s).abs().item() < 1e-9
    value.backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_or_zero_features_give_finite_loss_and_gradient(loss):
    for feature in (torch.ones(4, 3), torch.zeros(4, 3)):
        feature.requires_grad_()
        found = loss(feature, random(4, 2).float())
        found.backward()
        assert found.isfinite()
        assert feature.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_one_zero_feature_gives_no_huge_gradient(loss):
    feature = random(5, 3).float()
    feature[1] = 0
    feature.requires_grad_()
    loss(feature, random(5, 4, seed=1).float()).backward()
    assert 0 < feature.grad.abs().max() < 10


def test_two_equal_features_give_no_huge_gradient_of_the_angle_loss():
    feature = random(5, 3).float()
    feature[1] = feature[0]
    feature.requires_grad_()
    angle_loss(feature, random(5, 4, seed=1).float()).backward()
    assert 0 < feature.grad.abs().max() < 10


@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_shapes_raise_and_half_precision_gives_float32(loss):
    with pytest.raises(ValueError, match=r"^teacher_feature must be \[4, E\], got \[3, 2\]"):
        loss(random(4, 3), random(3, 2))
    with pytest.raises(ValueError, match="of 2 samples or more, got 1"):
        loss(random(1, 3), random(1, 2))
    half = loss(random(4, 3).half(), random(4, 2).half())
    assert half.dtype == torch.float32
