"""Traces of the Hessian of a network's mean loss, and relative flatness, estimated by random probes.

The notes in ``lightning_kd.metrics.curvature`` on the network, the data and rescaled weights apply here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.core.distributed import process_rank
from lightning_kd.metrics._arguments import generator
from lightning_kd.metrics._batch_derivatives import LossFn
from lightning_kd.metrics._objective import Measured, Objective, objective

_PROBES_AT_ONCE = 10


@dataclass(frozen=True)
class HessianTrace(Measured):
    """An estimated trace.

    Attributes:
        value: the mean of ``quadratic_forms``.
        standard_error: of ``value``; NaN with one probe, 0 where ``value`` is exact.
        probes: number of probes used.
        quadratic_forms: ``z^T H z`` of each probe ``z``.
        per_parameter: the part of each parameter tensor, by name; the parts sum to ``value``.
    """

    value: float
    standard_error: float
    probes: int
    quadratic_forms: list[float]
    per_parameter: dict[str, float]

    @property
    def per_layer(self) -> dict[str, float]:
        """The part of each module (weight and bias together) in ``value``, by module path."""
        layers: dict[str, float] = {}
        for name, value in self.per_parameter.items():
            layer = name.rpartition(".")[0]
            layers[layer] = layers.get(layer, 0.0) + value
        return layers


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    *,
    min_probes: int = 30,
    max_probes: int = 200,
    tolerance: float = 0.02,
    vectors: Tensor | None = None,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
    l2: float = 0.0,
) -> HessianTrace:
    """The trace of the Hessian and of its diagonal blocks, by Hutchinson's estimator.

    The mean of ``z^T H z`` over probes ``z``, vectors of random signs. Probes are added, ten at a time, until the
    standard error is at most ``tolerance`` times the estimate.

    Args:
        model: a network.
        loss_fn: as in ``hessian_vector_product``.
        loader: as in ``hessian_vector_product``.
        min_probes: smallest number of probes.
        max_probes: largest number of probes.
        tolerance: stop once the standard error is at most this fraction of the estimate.
        vectors: ``[k, P]``, probes to use instead of random ones.
        seed: of the random probes.
        parameters: as in ``hessian_vector_product``.
        l2: as in ``hessian_vector_product``.

    Raises:
        ValueError: where ``min_probes`` is below 1 or above ``max_probes``, ``vectors`` is not ``[k, P]``, and as in
            ``hessian_vector_product``.

    Source: Hutchinson, Communications in Statistics 19, 1990; Yao et al., PyHessian, arXiv 1912.07145.
    """
    with objective(model, loss_fn, loader, parameters=parameters, l2=l2) as found:
        return hutchinson(found, min_probes, max_probes, tolerance, vectors, seed)


def hutchinson(
    found: Objective,
    min_probes: int = 30,
    max_probes: int = 200,
    tolerance: float = 0.02,
    vectors: Tensor | None = None,
    seed: int = 0,
) -> HessianTrace:
    """``hessian_trace`` for an open ``Objective``."""
    size = len(found.weights)
    if vectors is not None:
        if vectors.ndim != 2 or vectors.shape[1] != size or not len(vectors):
            raise ValueError(f"vectors must be [k, {size}], one probe a row, got {list(vectors.shape)}")
        return _mean_form(found, _forms(found, lambda i: vectors[i]), len(vectors), len(vectors), tolerance)
    return _mean_form(found, _forms(found, lambda i: _signs(size, seed, i)), min_probes, max_probes, tolerance)


def layer_relative_flatness(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    layer: str,
    *,
    min_probes: int = 30,
    max_probes: int = 200,
    tolerance: float = 0.02,
    seed: int = 0,
    exact: bool = False,
) -> HessianTrace:
    """Relative flatness ``kappa`` of one layer, ``sum_{s,t} <w_s, w_t> tr(H_st)`` over pairs of its outputs.

    ``H_st`` are the blocks of the Hessian in the rows ``w_s`` of the weight ``W`` ``[K, D]`` (a filter of a
    convolution, flattened, is a row). Estimated by ``u = W z`` with random signs ``z`` ``[D, D]``: ``kappa`` is the
    mean of ``u^T H u``. It does not change when the layers of a ReLU network are rescaled such that the network
    computes the same function. For the classifier, ``lightning_kd.metrics.relative_flatness`` is exact and needs no
    derivative.

    Args:
        model: a network.
        loss_fn: as in ``hessian_vector_product``.
        loader: as in ``hessian_vector_product``.
        layer: path of a module whose ``weight`` has at least 2 dimensions.
        min_probes: as in ``hessian_trace``.
        max_probes: as in ``hessian_trace``.
        tolerance: as in ``hessian_trace``.
        seed: as in ``hessian_trace``.
        exact: compute the sum itself by ``D min(K, D)`` Hessian-vector products, for small layers; the standard error
            is 0.

    Raises:
        ValueError: where ``layer`` is not such a module, and as in ``hessian_trace``.

    Source: Petzka et al., arXiv 2001.00939, definition 3.
    """
    module = dict(model.named_modules()).get(layer)
    weight = getattr(module, "weight", None)
    name = f"{layer}.weight" if layer else "weight"
    if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or name not in dict(model.named_parameters()):
        raise ValueError(
            f"layer {layer!r} of {type(model).__name__} has no weight with rows: name a Linear or Conv module"
        )
    with objective(model, loss_fn, loader, parameters=[name]) as found:
        rows = found.weights.view(weight.shape[0], -1)
        width = rows.shape[1]
        if exact:
            # With W W^T = sum_a v_a v_a^T, v_a the left singular vectors times the singular values, the sum over pairs
            # of rows is the sum of u^T H u over u = v_a e_j^T, for all a and all columns j.
            left, sizes, _ = torch.linalg.svd(rows.double().cpu(), full_matrices=False)
            count = len(sizes) * width
            scaled = (left * sizes * math.sqrt(count)).T  # _mean_form divides by count, but the sum is wanted

            def column(i: int) -> Tensor:
                placed = torch.zeros(rows.shape, dtype=torch.float64)
                placed[:, i % width] = scaled[i // width]
                return placed.reshape(-1)

            return _exact(_mean_form(found, _forms(found, column), count, count, 0.0))

        def probe(i: int) -> Tensor:
            signs = _signs(width * width, seed, i).view(width, width)
            return (rows @ signs.to(rows)).reshape(-1)

        return _mean_form(found, _forms(found, probe), min_probes, max_probes, tolerance)


def gauss_newton_trace(
    model: nn.Module,
    loader: Any,
    *,
    min_probes: int = 30,
    max_probes: int = 200,
    tolerance: float = 0.02,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
    exact: bool = False,
) -> HessianTrace:
    """Trace of the Gauss-Newton matrix of softmax cross-entropy, ``mean_n tr(J_n^T (diag(p_n) - p_n p_n^T) J_n)``.

    It is at least 0. It equals the trace of the Hessian where the logits are piecewise linear in each single weight, as
    in ReLU networks without batch normalisation. A probe costs one backward pass: with a factor
    ``L L^T = diag(p) - p p^T`` and random signs ``z`` for each logit of each sample, it is the squared norm of the
    gradient of ``<logits, L z>``.

    Args:
        model: gives logits ``[B, C]`` for ``batch[0]``.
        loader: as in ``hessian_vector_product``, with targets ``batch[1]`` for the reported loss.
        min_probes: as in ``hessian_trace``.
        max_probes: as in ``hessian_trace``.
        tolerance: as in ``hessian_trace``.
        seed: as in ``hessian_trace``.
        parameters: as in ``hessian_vector_product``.
        exact: compute the trace itself by one backward pass for each class of each sample, for small networks and
            data; the standard error is 0.

    Returns:
        The estimate; ``hvps`` is 0.

    Raises:
        ValueError: as in ``hessian_trace``.
    """
    with objective(model, None, loader, parameters=parameters) as found:
        rank = process_rank()

        def whole(batch: int, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
            p = logits.softmax(1)
            for n in range(p.shape[0]):
                for c in range(p.shape[1]):
                    given = torch.zeros_like(p)
                    given[n] -= p[n]
                    given[n, c] += 1
                    yield 0, p[n, c].sqrt() * given

        def forms(start: int, end: int) -> Tensor:
            def drawn(batch: int, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
                p = logits.softmax(1)
                for probe in range(start, end):
                    stream = generator(seed, "logits", probe, batch, rank)
                    root = p.sqrt() * (torch.randint(0, 2, logits.shape, generator=stream) * 2 - 1).to(p)
                    yield probe - start, root - p * root.sum(1, keepdim=True)

            return found.gradient_forms(drawn, end - start)

        if exact:
            return _exact(_mean_form(found, lambda start, end: found.gradient_forms(whole, 1), 1, 1, 0.0))
        return _mean_form(found, forms, min_probes, max_probes, tolerance)


def _forms(found: Objective, probe: Callable[[int], Tensor]) -> Callable[[int, int], Tensor]:
    return lambda start, end: found.quadratic_forms([probe(i) for i in range(start, end)])


def _mean_form(
    found: Objective, of_probes: Callable[[int, int], Tensor], least: int, most: int, tolerance: float
) -> HessianTrace:
    """The mean over probes 0, 1, ... until its standard error is small; ``of_probes(start, end)`` computes some."""
    if not 1 <= least <= most:
        raise ValueError(f"min_probes must be from 1 to max_probes={most}, got {least}")
    forms = torch.zeros(0, len(found.names), dtype=torch.float64)
    error = math.nan
    while len(forms) < most:
        end = min(len(forms) + _PROBES_AT_ONCE, most)
        forms = torch.cat([forms, of_probes(len(forms), end)])
        total = forms.sum(1)
        error = float(total.std()) / math.sqrt(len(total)) if len(total) > 1 else math.nan
        if len(forms) >= least and error <= tolerance * abs(float(total.mean())):
            break
    total = forms.sum(1)
    return HessianTrace(
        **found.measured(),
        value=float(total.mean()),
        standard_error=error,
        probes=len(forms),
        quadratic_forms=total.tolist(),
        per_parameter=dict(zip(found.names, forms.mean(0).tolist(), strict=True)),
    )


def _exact(trace: HessianTrace) -> HessianTrace:
    return replace(trace, standard_error=0.0)


def _signs(size: int, seed: int, number: int) -> Tensor:
    """Random signs, int8 ``[size]``; drawn on the CPU, so that every process and device gets the same."""
    return torch.randint(0, 2, (size,), dtype=torch.int8, generator=generator(seed, "probe", number)) * 2 - 1
