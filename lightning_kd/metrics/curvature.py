"""Hessian-vector products of a network's mean loss, and the largest and smallest eigenvalues of its Hessian.

Every function takes a network, a loss and data, in this order. It restores the network's mode and leaves parameters,
buffers, gradients and the random state unchanged. The Hessian is that of the network in eval mode, in float32 (float64
where the network is), without autocast and TF32.

Eigenvalues and traces change when weights are rescaled although the network still computes the same function (two
layers around a ReLU, or a convolution before batch normalisation), and they shrink with the loss. So compare networks
at equal data and loss, and report ``layer_relative_flatness`` too, which such rescaling does not change.

Yao et al., PyHessian, arXiv 1912.07145; Petzka et al., Relative Flatness and Generalization, arXiv 2001.00939.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.metrics._arguments import generator
from lightning_kd.metrics._batch_derivatives import LossFn
from lightning_kd.metrics._objective import Measured, Objective, objective


@dataclass(frozen=True)
class HessianEigenvalues(Measured):
    """The largest and smallest eigenvalues of a Hessian.

    Attributes:
        values: the ``k`` largest eigenvalues (by value, not by magnitude), descending.
        smallest: the smallest eigenvalue; negative away from a minimum.
        error: upper bound on the distance of each of these from the nearest true eigenvalue, rounding aside.
        alpha: diagonal of the tridiagonal Lanczos matrix, one entry for each step.
        beta: off-diagonal of that matrix, one entry less.
    """

    values: list[float]
    smallest: float
    error: float
    alpha: list[float]
    beta: list[float]


@dataclass(frozen=True)
class PowerIteration(Measured):
    """The eigenvalue of largest magnitude.

    Attributes:
        value: the last Rayleigh quotient.
        quotients: the Rayleigh quotient ``v^T H v`` of the unit vector ``v`` of each step.
    """

    value: float
    quotients: list[float]


def hessian_vector_product(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    vector: Tensor,
    *,
    parameters: Sequence[str] | None = None,
    l2: float = 0.0,
) -> Tensor:
    """The Hessian of the mean loss times a vector.

    With several processes, each passes its share of the data (no sample twice) and the same vector; all get the product
    with the Hessian over all samples. A parameter that the loss does not depend on has second derivative 0.

    Args:
        model: a network.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of a batch as a scalar. Default: cross-entropy of
            ``model(batch[0])`` on ``batch[1]``.
        loader: one batch, a list of batches, or a loader that gives the same samples in every pass. The losses of
            batches are weighted by batch size; tensors are moved to the model's device and dtype.
        vector: ``[P]``, all chosen parameters flattened, in the order of ``model.named_parameters()``.
        parameters: names of parameters, or of modules for all of theirs. Default: all trainable ones.
        l2: adds ``l2 / 2`` times the squared norm of the chosen parameters to the loss. Default: 0.

    Returns:
        ``[P]``, float32, or float64 where the network has a float64 parameter.

    Raises:
        ValueError: where there is no sample or no parameter, the loss is not finite, or ``vector`` is not ``[P]``.
        TypeError: where ``loader`` can be read only once.
        RuntimeError: where an operation of the loss has no second derivative.
    """
    with objective(model, loss_fn, loader, parameters=parameters, l2=l2) as found:
        return found.hvp(found.check(vector, "vector"))


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    k: int = 1,
    steps: int = 30,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    offload: bool = False,
    parameters: Sequence[str] | None = None,
    l2: float = 0.0,
) -> HessianEigenvalues:
    """The largest eigenvalues of the Hessian and the smallest one, by Lanczos iteration with full reorthogonalisation.

    Args:
        model: a network.
        loss_fn: as in ``hessian_vector_product``.
        loader: as in ``hessian_vector_product``.
        k: how many of the largest eigenvalues.
        steps: largest number of Hessian-vector products; the outermost eigenvalues converge first.
        start: ``[P]``, the first vector, of any norm above 0. Default: standard normal numbers drawn with ``seed``.
        seed: of the default ``start``.
        offload: keep the ``steps`` vectors ``[P]`` on the CPU instead of the model's device.
        parameters: as in ``hessian_vector_product``.
        l2: as in ``hessian_vector_product``.

    Returns:
        The eigenvalues, an error bound, and the Lanczos matrix.

    Raises:
        ValueError: where ``k`` is below 1, above ``steps`` or above the number of parameters, where ``loader`` gives
            other samples in another pass, and as in ``hessian_vector_product``.
    """
    with objective(model, loss_fn, loader, parameters=parameters, l2=l2) as found:
        return lanczos(found, k, steps, start, seed, offload)


def lanczos(
    found: Objective, k: int = 1, steps: int = 30, start: Tensor | None = None, seed: int = 0, offload: bool = False
) -> HessianEigenvalues:
    """``hessian_eigenvalues`` for an open ``Objective``."""
    size = len(found.weights)
    steps = min(steps, size)
    if not 1 <= k <= steps:
        raise ValueError(
            f"k must be from 1 to {steps}, the smaller of steps and the number of parameters, got {k}: take more steps "
            "or fewer eigenvalues"
        )
    place = torch.device("cpu") if offload else found.device
    basis = torch.zeros(steps, size, dtype=found.dtype, device=place)
    alpha: list[float] = []
    beta: list[float] = []
    vector = _start(found, start, seed).to(place)
    rest = 0.0
    for i in range(steps):
        basis[i] = vector
        product = found.hvp(vector.to(found.device)).to(place)
        alpha.append(float(vector @ product))
        product -= alpha[-1] * vector
        if i:
            product -= beta[-1] * basis[i - 1]
        product = _orthogonal(product, basis[: i + 1])
        rest = float(product.norm())
        if i == steps - 1:
            break
        scale = max(map(abs, [*alpha, *beta]))
        if rest <= 10 * torch.finfo(found.dtype).eps * scale:
            rest = 0.0
            if i + 1 >= k:
                break  # the Krylov space of the start vector is exhausted
            vector = _orthogonal(_start(found, None, seed + i + 1).to(place), basis[: i + 1])
            vector /= vector.norm()
        else:
            vector = product / rest
        beta.append(rest)
    matrix = torch.diag(torch.tensor(alpha, dtype=torch.float64))
    off = torch.tensor(beta, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix + torch.diag(off, 1) + torch.diag(off, -1))
    bounds = rest * vectors[-1].abs()
    return HessianEigenvalues(
        **found.measured(),
        values=values.flip(0)[:k].tolist(),
        smallest=float(values[0]),
        error=float(torch.cat([bounds[:1], bounds[-k:]]).max()),
        alpha=alpha,
        beta=beta,
    )


def power_iteration(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    *,
    steps: int = 100,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
    l2: float = 0.0,
) -> PowerIteration:
    """The eigenvalue of largest magnitude, which may be negative, by power iteration.

    For comparison with papers that report it; ``hessian_eigenvalues`` needs fewer products for both ends of the
    spectrum.

    Args:
        model: a network.
        loss_fn: as in ``hessian_vector_product``.
        loader: as in ``hessian_vector_product``.
        steps: largest number of Hessian-vector products.
        tolerance: stop once the Rayleigh quotient changes by less than this fraction of itself; 0 for all steps.
        start: ``[P]``, the first vector, of any norm above 0. Default: standard normal numbers drawn with ``seed``.
        seed: of the default ``start``.
        parameters: as in ``hessian_vector_product``.
        l2: as in ``hessian_vector_product``.

    Returns:
        The eigenvalue and the Rayleigh quotient of each step.

    Raises:
        ValueError: where ``steps`` is below 1, and as in ``hessian_vector_product``.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with objective(model, loss_fn, loader, parameters=parameters, l2=l2) as found:
        vector = _start(found, start, seed)
        quotients: list[float] = []
        for _ in range(steps):
            product = found.hvp(vector)
            quotients.append(float(vector @ product))
            length = float(product.norm())
            if length == 0:
                break
            vector = product / length
            if len(quotients) > 1 and abs(quotients[-1] - quotients[-2]) < tolerance * abs(quotients[-2]):
                break
        return PowerIteration(**found.measured(), value=quotients[-1], quotients=quotients)


def _start(found: Objective, start: Tensor | None, seed: int) -> Tensor:
    """The given vector, or a random one, scaled to norm 1."""
    if start is None:
        start = torch.randn(len(found.weights), generator=generator(seed, "start", 0), dtype=torch.float64)
    vector = found.check(start, "start")
    length = float(vector.norm())
    if not 0 < length < math.inf:
        raise ValueError(f"start must have a finite norm above 0, got {length}")
    return vector / length


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """``vector`` minus its projection on the orthonormal rows of ``basis``; done twice to remove rounding errors."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
