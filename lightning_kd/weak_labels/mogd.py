"""MoGD: of the candidate labels of a sample, those count that lower the loss on a few samples with clean labels.

Bo-Shi Zou, Ming-Kun Xie, Sheng-Jun Huang. Meta Objective Guided Disambiguation for Partial Label Learning. arXiv
2208.12459. No official code was found: what the abstract leaves open follows learning to reweight examples (Ren et al.,
ICML 2018, arXiv 1803.09050), applied to pairs of a sample and a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.distributed import averaged, process_count
from lightning_kd.core.losses import at_least_float32, check_shapes, check_target
from lightning_kd.weak_labels.candidate_weights import check_candidates

__all__ = ["candidate_meta_gradient", "updated_weights"]

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def candidate_meta_gradient(
    forward: Forward,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    candidates: Tensor,
    meta_x: Tensor,
    meta_target: Tensor,
    weights: Tensor | None,
    lr: float,
) -> Tensor:
    """How the meta loss after a virtual step changes with the weight of each candidate label.

    The virtual step goes by ``lr`` against the gradient of ``1/B sum_ij w_ij S_ij l_ij``, ``l_ij`` the cross-entropy
    of sample ``i`` with label ``j``. With ``u`` the gradient of the meta loss after it, the derivative in ``w_ij`` is
    ``-lr/B <u, grad l_ij>``. For all ``i`` and ``j`` at once that is one derivative of ``log softmax`` along ``u``, in
    forward mode: exact, also for batch norm in training mode, and without second derivatives.

    Several processes: each has a part of both batches, of one size, and gets what one process gets for these rows.

    Args:
        forward: from parameters by name and ``x`` to logits ``[B, K]``, as ``torch.func.functional_call`` does. It is
            called three times; random masks must be the same in each, and statistics of its own copies.
        parameters: those that the virtual step moves, by name.
        x: the samples.
        candidates: ``S``, ``[B, K]``, above 0 where a class is a candidate.
        meta_x: samples with clean labels.
        meta_target: int64 ``[M]``.
        weights: ``w``, ``[B, K]``, those of the virtual step; ``None`` for zeros, which spares a pass.
        lr: of the virtual step.

    Returns:
        ``[B, K]``, without gradient; 0 off the candidates, whose weights have no effect.

    Raises:
        ValueError: for shapes that do not belong together, a sample without candidates, meta labels out of range.
        RuntimeError: where ``forward`` has an operation without a derivative in forward mode.

    Source: arXiv 2208.12459; the closed form of the derivative was derived for this package.
    """
    check_numbers(least=0, lr=lr)
    slope = meta_slopes(forward, parameters, x, candidates, meta_x, meta_target, weights, lr)
    return slope * (lr / (len(x) * process_count()))


def meta_slopes(
    forward: Forward,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    candidates: Tensor,
    meta_x: Tensor,
    meta_target: Tensor,
    weights: Tensor | None,
    lr: float,
) -> Tensor:
    """``-<u, grad l_ij>``, the meta gradient without its factor ``lr/B``; arguments as there."""
    if len(candidates) != len(x):
        raise ValueError(
            f"candidates must have a row for each of {len(x)} samples, got {len(candidates)}: give both of one batch"
        )
    there = check_candidates(candidates)
    start = {name: p.detach() for name, p in parameters.items()}
    moved = start
    if weights is not None:
        check_shapes(candidates=(candidates, "BK"), weights=(weights, "BK"))
        gradients = _gradients(lambda leaves: -_likelihood(forward(leaves, x), there, weights.detach()), start)
        moved = {name: p - lr * gradients[name] for name, p in start.items()}
    direction = _gradients(lambda leaves: _meta_loss(forward(leaves, meta_x), meta_target), moved)
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in start.items()}
        try:
            logits = forward(duals, x)
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            raise RuntimeError(
                f"forward has an operation without a derivative in forward mode ({str(error).splitlines()[0]}): take "
                "another network, or meta_layer='head' of MoGD"
            ) from error
        check_shapes(logits=(logits, "BK"), candidates=(candidates, "BK"))
        slope = forward_ad.unpack_dual(at_least_float32(logits)[0].log_softmax(1)).tangent
        if slope is None:
            raise RuntimeError("forward must use the parameters it is given, got logits that do not depend on them")
        return slope.masked_fill(~there, 0.0)


def _likelihood(logits: Tensor, there: Tensor, weights: Tensor) -> Tensor:
    """The weighted log-likelihood of the candidates, the mean over samples."""
    check_shapes(logits=(logits, "BK"), candidates=(there, "BK"))
    (logits,) = at_least_float32(logits)
    return (logits.log_softmax(1) * (weights * there)).sum() / len(logits)


def _meta_loss(logits: Tensor, target: Tensor) -> Tensor:
    check_target(logits, target, "meta_target")
    return F.cross_entropy(*at_least_float32(logits), target)


def _gradients(loss: Callable[[dict[str, Tensor]], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of ``loss`` at ``values``, by name, the mean over all processes."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, averaged(found), strict=True))


def updated_weights(
    weights: Tensor,
    gradient: Tensor,
    candidates: Tensor,
    step: float,
    normalization: Literal["example", "batch"] = "example",
) -> Tensor:
    """New weights of the candidates: a step against the meta gradient, cut off at 0, and normalised.

    By ``"example"`` those of each sample sum to 1, and a sample whose candidates would all get 0 has equal ones; a
    single candidate so always has 1. By ``"batch"`` all of the batch sum to 1, and such a sample drops out (if all do,
    all are 0).

    Args:
        weights: ``[B, K]`` before; zeros for the start without memory, where ``step`` then does not matter.
        gradient: ``[B, K]`` of ``candidate_meta_gradient``.
        candidates: ``[B, K]``, above 0 where a class is a candidate.
        step: 0 or more.
        normalization: ``"example"`` or ``"batch"``.

    Returns:
        ``[B, K]``, at least 0, without gradient; 0 off the candidates.

    Raises:
        ValueError: for shapes that differ, a sample without candidates, and arguments out of range.

    Source: arXiv 2208.12459; normalised by the batch as in arXiv 1803.09050.
    """
    check_numbers(least=0, step=step)
    if normalization not in ("example", "batch"):
        raise ValueError(f"normalization must be 'example' or 'batch', got {normalization!r}: give one of them")
    check_shapes(weights=(weights, "BK"), gradient=(gradient, "BK"), candidates=(candidates, "BK"))
    there = check_candidates(candidates)
    weights, gradient = at_least_float32(weights.detach(), gradient.detach())
    raised = (weights - step * gradient).clamp(min=0).masked_fill(~there, 0.0)
    if normalization == "batch":
        total = raised.sum()
        return raised / torch.where(total > 0, total, 1.0)
    total = raised.sum(1, keepdim=True)
    raised = torch.where(total > 0, raised, there.to(raised.dtype))
    return raised / raised.sum(1, keepdim=True)
