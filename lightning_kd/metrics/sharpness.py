"""Epsilon-sharpness (the rise of the loss near a network's weights), and one report of all measures of flatness."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_kd.core.outputs import logits_of
from lightning_kd.metrics._batch_derivatives import LossFn
from lightning_kd.metrics._objective import Measured, Objective, objective
from lightning_kd.metrics.classifier_head import feature_hessian_trace, neural_collapse, relative_flatness
from lightning_kd.metrics.curvature import lanczos
from lightning_kd.metrics.traces import hutchinson

RHOS = (0.01, 0.05, 0.1, 0.5)
PARTS = ("eigenvalues", "trace", "epsilon", "head")
_IGNORED = -100  # ignore_index of cross_entropy
_CAVEAT = (
    "Compare networks at equal data and loss. Eigenvalues, trace and rises change when weights are rescaled, even "
    "where the network computes the same function; kappa does not."
)


@dataclass(frozen=True)
class EpsilonSharpness(Measured):
    """The rise of the loss after one gradient ascent step.

    Attributes:
        value: ``perturbed_loss - loss``.
        perturbed_loss: mean loss after the step.
        rho: length of the step.
    """

    value: float
    perturbed_loss: float
    rho: float


@dataclass(frozen=True)
class Sharpness:
    """The report of ``measure_sharpness``; ``print`` shows it as a table. What was not measured is ``None``.

    Eigenvalues, traces and rises of the loss change when weights are rescaled, even where the network computes the same
    function, and near zero training loss they shrink with the loss: they compare networks only at equal data and loss.
    ``kappa`` does not change by such rescaling.

    Attributes:
        loss: mean loss over the samples; quote it beside every number below.
        samples: number of samples over all processes.
        accuracy: on the samples, in [0, 1].
        top_eigenvalue: largest eigenvalue of the Hessian.
        smallest_eigenvalue: smallest eigenvalue of the Hessian; negative away from a minimum.
        trace: estimated trace of the Hessian.
        trace_error: standard error of ``trace``.
        layer_traces: part of each layer in ``trace``, by module path.
        epsilon_sharpness: rise of the loss after a gradient ascent step, by the length of the step.
        kappa: relative flatness of the classifier, see ``relative_flatness``.
        feature_trace: trace of the Hessian with respect to the classifier's input, see ``feature_hessian_trace``.
        nc1: variance of these features within classes over that between classes, see ``neural_collapse``.
        weight_norm: Euclidean norm of the measured parameters.
        hvps: number of Hessian-vector products computed.
        dtype: of the computation, ``"float32"`` or ``"float64"``.
        trace_tolerance: the fraction of ``trace`` that its standard error was to fall below.
    """

    loss: float
    samples: int
    accuracy: float | None = None
    top_eigenvalue: float | None = None
    smallest_eigenvalue: float | None = None
    trace: float | None = None
    trace_error: float | None = None
    layer_traces: dict[str, float] | None = None
    epsilon_sharpness: dict[float, float] | None = None
    kappa: float | None = None
    feature_trace: float | None = None
    nc1: float | None = None
    weight_norm: float | None = None
    hvps: int = 0
    dtype: str = "float32"
    trace_tolerance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: keys are strings, infinite and NaN numbers are ``None``."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
        rows = [("loss", _number(self.loss), f"{self.samples:,} samples{accuracy}, {self.dtype}")]
        for name, value, note in (
            ("top eigenvalue", self.top_eigenvalue, ""),
            ("smallest eigenvalue", self.smallest_eigenvalue, ""),
            ("trace", self.trace, self._trace_note()),
        ):
            if value is not None:
                rows.append((name, _number(value), note))
        layers = self.layer_traces or {}
        shown = sorted(layers, key=lambda layer: -abs(layers[layer]))[:12]
        rows += [(f"  {layer or 'the network'}", _number(v), "") for layer, v in layers.items() if layer in shown]
        if len(layers) > len(shown):
            others = sum(value for layer, value in layers.items() if layer not in shown)
            rows.append((f"  {len(layers) - len(shown)} others", _number(others), ""))
        for rho, rise in (self.epsilon_sharpness or {}).items():
            rows.append((f"rise at {rho:g}", _number(rise), ""))
        for name, value in (
            ("kappa", self.kappa),
            ("feature trace", self.feature_trace),
            ("NC1", self.nc1),
            ("weight norm", self.weight_norm),
        ):
            if value is not None:
                rows.append((name, _number(value), ""))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{name:<{width}}  {value:>11}  {note}".rstrip() for name, value, note in rows]
        return "\n".join([*lines, _CAVEAT])

    def _trace_note(self) -> str:
        if self.trace is None or self.trace_error is None or math.isnan(self.trace_error):
            return "one probe, error unknown"
        note, wanted = f"standard error {_number(self.trace_error)}", self.trace_tolerance
        if wanted is not None and self.trace_error > wanted * abs(self.trace):
            note += f", above {wanted:.3g} of the trace: take more probes"
        return note


def epsilon_sharpness(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    eta: float = 0.01,
    parameters: Sequence[str] | None = None,
) -> EpsilonSharpness:
    """``L(w + e) - L(w)`` for one gradient ascent step ``e`` along the gradient ``g`` over all the data.

    ``e = rho g / |g|`` as in SAM (Foret et al., arXiv 2010.01412). With ``adaptive`` it is ASAM's
    ``rho T^2 g / |T g|`` (Kwon et al., arXiv 2102.11600), where ``T`` is ``|w| + eta`` for parameters with "weight" in
    their name and 1 for others. With ``eta=0`` and no biases it does not change when the layers of a ReLU network are
    rescaled such that the network computes the same function.

    Args:
        model: a network.
        loss_fn: as in ``lightning_kd.metrics.hessian_vector_product``.
        loader: as in ``lightning_kd.metrics.hessian_vector_product``.
        rho: length of the step.
        adaptive: take ASAM's step instead of SAM's.
        eta: ``eta`` of ASAM's ``T``.
        parameters: as in ``lightning_kd.metrics.hessian_vector_product``.

    Returns:
        The rise of the loss and the loss after the step.

    Raises:
        ValueError: where ``rho`` is not positive and finite, and as in ``hessian_vector_product``.
    """
    with objective(model, loss_fn, loader, parameters=parameters) as found:
        rise = _rises(found, [rho], adaptive, eta)[rho]
        return EpsilonSharpness(**found.measured(), value=rise, perturbed_loss=found.loss + rise, rho=rho)


def measure_sharpness(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    *,
    num_classes: int | None = None,
    classifier: nn.Module | None = None,
    which: Collection[Literal["eigenvalues", "trace", "epsilon", "head"]] = PARTS,  # type: ignore[assignment]
    rhos: Sequence[float] = RHOS,
    steps: int = 30,
    min_probes: int = 30,
    max_probes: int = 200,
    tolerance: float = 0.02,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
) -> Sharpness:
    """Every measure of the flatness of a network's minimum, and the loss, in one report.

    The network stays unchanged. With several processes, each passes its share of the samples; all get the same report.

    Args:
        model: a network.
        loss_fn: as in ``hessian_vector_product``. With a loss of your own, accuracy is measured only where
            ``num_classes`` or ``classifier`` is given.
        loader: as in ``hessian_vector_product``.
        num_classes: for ``nc1``. Default: one more than the largest target.
        classifier: the linear layer of ``model`` that maps features to logits, for ``kappa``, ``feature_trace`` and
            ``nc1``, which are ``None`` without it or where its output is not that of ``model(batch[0])``. Samples of
            target -100, which cross-entropy ignores, are left out.
        which: parts to measure, of ``"eigenvalues"``, ``"trace"``, ``"epsilon"`` and ``"head"``. Default: all.
        rhos: lengths of the ascent steps.
        steps: largest number of Hessian-vector products for the eigenvalues.
        min_probes: of the trace, as in ``hessian_trace``.
        max_probes: of the trace, as in ``hessian_trace``.
        tolerance: of the trace, as in ``hessian_trace``.
        seed: of the trace's probes and of the first vector of the Lanczos iteration.
        parameters: as in ``hessian_vector_product``.

    Raises:
        ValueError: for an unknown part, a length that is not positive, and as in ``hessian_vector_product``.
    """
    if unknown := set(which) - set(PARTS):
        raise ValueError(f"which must be some of {list(PARTS)}, got {sorted(unknown)}")
    values: dict[str, Any] = {}
    with objective(model, loss_fn, loader, parameters=parameters) as found:
        found.value()
        if loss_fn is None or num_classes is not None or classifier is not None:
            values |= _head(found, classifier if "head" in which else None, num_classes)
        if "eigenvalues" in which:
            spectrum = lanczos(found, steps=steps, seed=seed)
            values |= {"top_eigenvalue": spectrum.values[0], "smallest_eigenvalue": spectrum.smallest}
        if "trace" in which:
            trace = hutchinson(found, min_probes, max_probes, tolerance, seed=seed)
            values |= {"trace": trace.value, "trace_error": trace.standard_error, "layer_traces": trace.per_layer}
            values["trace_tolerance"] = tolerance
        if "epsilon" in which:
            values["epsilon_sharpness"] = _rises(found, rhos)
        norm = float(found.weights.norm())
        dtype = found.measured()["dtype"]
        return Sharpness(found.loss, found.samples, weight_norm=norm, hvps=found.hvps, dtype=dtype, **values)


def _rises(found: Objective, rhos: Sequence[float], adaptive: bool = False, eta: float = 0.01) -> dict[float, float]:
    """The rise of the loss by the length of the step, for steps along one gradient."""
    if any(not 0 < rho < math.inf for rho in rhos):
        raise ValueError(f"rho must be a positive length, got {list(rhos)}")
    gradient = found.gradient()
    direction = gradient / (gradient.norm() + 1e-12)
    if adaptive:
        scales = [
            leaf.detach().abs() + eta if "weight" in name else torch.ones_like(leaf)
            for name, leaf in zip(found.names, found.leaves, strict=True)
        ]
        scale = torch.cat([part.reshape(-1) for part in scales])
        direction = scale.square() * gradient / ((scale * gradient).norm() + 1e-16)
    here = found.value()
    return {rho: found.value(found.weights + rho * direction) - here for rho in rhos}


def _head(found: Objective, classifier: nn.Module | None, num_classes: int | None) -> dict[str, float]:
    """Accuracy, and the measures in the classifier's input and output."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.update(feature=args[0], logits=output)

    def measure(model: nn.Module, batch: Any) -> list[Tensor]:
        seen.clear()
        try:
            answer, target = logits_of(model(batch[0])), batch[1]
        except TypeError:  # logits_of cannot read such an output
            return []
        labels = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
        if not labels or not isinstance(answer, Tensor) or answer.ndim != 2 or answer.shape[1] < 2:
            return []  # not single-label classification
        feature, logits = seen.get("feature", answer[:, :0]), seen.get("logits", answer)
        if feature.ndim != 2 or len(feature) != len(answer) or logits.shape != answer.shape:
            feature, logits = answer[:, :0], answer
        # false where the classifier belongs to another network, or the model changes its output
        same = feature.numel() > 0 and torch.allclose(logits.to(answer), answer, rtol=1e-4, atol=1e-6)
        parts = [answer.argmax(1) == target, target, torch.full_like(target, same, dtype=torch.bool), feature, logits]
        return [part[target != _IGNORED] for part in parts]

    handle = None if classifier is None else classifier.register_forward_hook(keep)
    try:
        collected = found.collect(measure)
    finally:
        if handle is not None:
            handle.remove()
    if not collected or not len(collected[0]):
        return {}
    right, target, same, feature, logits = collected
    values = {"accuracy": float(right.double().mean())}
    if classifier is None or not same.all():
        return values
    weight: Any = classifier.weight
    return {
        **values,
        "kappa": relative_flatness(feature, weight, logits),
        "feature_trace": feature_hessian_trace(weight, logits),
        "nc1": neural_collapse(feature, target, num_classes or int(target.max()) + 1),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else key: _plain(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
