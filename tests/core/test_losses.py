"""The negative learning loss: worked numbers, gradients, extreme logits, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_kd.core.losses import negative_learning_loss

P = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize(("target", "expected"), [(0, 1.203973), (1, 0.223144), (2, 0.105361)])
def test_negative_learning_worked_numbers(target: int, expected: float, eps: float) -> None:
    logits = (P.log() + 3).requires_grad_()
    loss = negative_learning_loss(logits, torch.tensor([target]), eps)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    p = P[0].tolist()
    expected_gradient = [p[target] if k == target else -p[target] * p[k] / (1 - p[target]) for k in range(3)]
    assert logits.grad[0].tolist() == pytest.approx(expected_gradient)


@pytest.mark.parametrize("classes", [2, 5])
def test_negative_learning_passes_gradcheck_and_equals_direct_formula(classes: int) -> None:
    logits = torch.randn(4, classes, dtype=torch.float64, requires_grad=True)
    target = torch.arange(4) % classes
    assert torch.autograd.gradcheck(negative_learning_loss, (logits, target))
    direct = -(1 - logits.softmax(1)[range(4), target]).log().mean()
    assert negative_learning_loss(logits, target).item() == pytest.approx(direct.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [20.0, 110.0, 1e4])
def test_negative_learning_stays_finite_and_keeps_its_gradient(size: float, dtype: torch.dtype) -> None:
    for z, p in ((size, 1.0), (-size, math.exp(-size) / 9)):  # the probability of the class is near 1, or near 0
        logits = torch.zeros(1, 10, dtype=dtype)
        logits[0, 3] = z
        logits.requires_grad_()
        size_as_given = logits[0, 3].item()
        loss = negative_learning_loss(logits, torch.tensor([3]))
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(size_as_given - math.log(9) if z > 0 else p, rel=1e-5)
        loss.backward()
        assert logits.grad is not None
        assert logits.grad[0, 3].item() == pytest.approx(p, rel=1e-2, abs=1e-7)
        assert logits.grad.isfinite().all()


def test_negative_learning_clamp_by_eps_stops_the_gradient() -> None:
    logits = torch.tensor([[20.0, 0, 0], [1, 0, 0]], requires_grad=True)
    target = torch.tensor([0, 0])
    loss = negative_learning_loss(logits, target, 1e-5)
    direct = -(1 - logits.softmax(1)[:, 0]).clamp(1e-5, 1).log().mean()
    assert loss.item() == pytest.approx(direct.item(), rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1, 0].item() == pytest.approx(logits.detach().softmax(1)[1, 0].item() / 2)


def test_negative_learning_of_several_classes_is_the_mean() -> None:
    logits = torch.randn(3, 4)
    target = torch.tensor([[0, 1], [2, 2], [3, 0]])
    each = [negative_learning_loss(logits[[b]], target[b, [m]]) for b in range(3) for m in range(2)]
    torch.testing.assert_close(negative_learning_loss(logits, target), torch.stack(each).mean())
    torch.testing.assert_close(
        negative_learning_loss(logits, target[:, :1]), negative_learning_loss(logits, target[:, 0])
    )


def test_negative_learning_ignores_autocast() -> None:
    logits, target = torch.randn(8, 5), torch.arange(8) % 5
    with torch.autocast("cpu", torch.bfloat16):
        inside = negative_learning_loss(logits, target)
    assert torch.equal(inside, negative_learning_loss(logits, target))


def test_negative_learning_wrong_arguments_raise() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^logits must be \[B, C\] with at least 2 classes, got \[2, 1\]"):
        negative_learning_loss(torch.zeros(2, 1), torch.tensor([0, 0]))
    for target in (torch.zeros(3).long(), torch.zeros(2), torch.zeros(2, 0).long(), torch.zeros(2, 1, 1).long()):
        with pytest.raises(ValueError, match=r"^complementary_target must be int64 \[B\] or \[B, M\] for 2 samples"):
            negative_learning_loss(logits, target)
    with pytest.raises(ValueError, match=r"^eps must be at least 0 and below 1, got 1"):
        negative_learning_loss(logits, torch.tensor([0, 1]), eps=1)
