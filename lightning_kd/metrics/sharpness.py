"""How much the loss rises near the weights of a network, and one report of all that says how flat its minimum is."""

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
_IGNORED = -100  # the target that cross-entropy leaves out
_CAVEAT = (
    "Compare networks at equal data and loss. Eigenvalues, trace and rises change when weights are rescaled so that "
    "the function stays; kappa does not."
)


@dataclass(frozen=True)
class EpsilonSharpness(Measured):
    """The rise of the loss after one step of ascent.

    Attributes:
        value: ``perturbed_loss - loss``.
        perturbed_loss: after the step.
        rho: its length.
    """

    value: float
    perturbed_loss: float
    rho: float


@dataclass(frozen=True)
class Sharpness:
    """What ``measure_sharpness`` found; ``None`` where it was not asked for or is not defined. ``print`` it.

    Raw eigenvalues, traces and rises of the loss change when weights are rescaled so that the network's function stays,
    and near interpolation they shrink with the loss: they compare networks only at equal data and loss. ``kappa`` does
    not change by such rescaling.

    Attributes:
        loss: mean over the samples; belongs beside every number below.
        accuracy: on the samples, in [0, 1].
        samples: how many, over all processes.
        top_eigenvalue: largest eigenvalue of the Hessian.
        smallest_eigenvalue: negative away from a minimum.
        trace: of the Hessian, estimated.
        trace_error: standard error of ``trace``.
        layer_traces: parts of ``trace`` by module path.
        epsilon_sharpness: rise of the loss after a step of ascent, by its length.
        kappa: relative flatness of the classifier.
        feature_trace: trace of the Hessian in the features that enter the classifier.
        nc1: scatter of these features within classes over that between classes.
        weight_norm: Euclidean norm of the parameters that were varied.
        hvps: Hessian-vector products made.
        dtype: of the computation.
        trace_tolerance: share of ``trace`` that its error was to come down to.
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
        """Plain values for JSON: keys are strings, what is not finite is ``None``."""
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
    """``L(w + e) - L(w)`` after one step of ascent ``e`` along the gradient ``g`` of all the data.

    ``e = rho g / |g|`` as in SAM (Foret et al., arXiv 2010.01412). With ``adaptive`` it is ASAM's
    ``rho T^2 g / |T g|`` (Kwon et al., arXiv 2102.11600), where ``T`` is ``|w| + eta`` for parameters with "weight" in
    their name and 1 for others; with ``eta`` 0 and no biases, rescaling the layers of a ReLU network so that its
    function stays does not change it.

    Args:
        model: see ``lightning_kd.metrics.hessian_vector_product``, as ``loss_fn``, ``loader`` and ``parameters``.
        loss_fn: the loss.
        loader: the data.
        rho: length of the step.
        adaptive: ASAM's step.
        eta: of ``T``.

    Raises:
        ValueError: where ``rho`` is not positive; and as ``hessian_vector_product``.
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
    """All that says how flat a network's minimum is, with the loss beside it, in one go.

    The network is left as it was. Several processes: each gives its share of the samples, and all get the same result.

    Args:
        model: see ``lightning_kd.metrics.hessian_vector_product``, as ``loss_fn``, ``loader`` and ``parameters``.
        loss_fn: the loss. With one of your own and neither ``num_classes`` nor ``classifier`` there is no accuracy.
        loader: the data.
        num_classes: for NC1. Default: one more than the largest target.
        classifier: the linear layer of ``model`` whose input is the feature and whose output the logits. Default: no
            ``kappa``, ``feature_trace`` and ``nc1``; nor are they given where ``model(batch[0])``, whose accuracy this
            is, is not this output. Samples of target -100, which cross-entropy ignores, are left out.
        which: parts to measure: ``"eigenvalues"``, ``"trace"``, ``"epsilon"``, ``"head"``.
        rhos: lengths of the steps of ascent.
        steps: Hessian-vector products for the eigenvalues.
        min_probes: for the trace, see ``hessian_trace``, as ``max_probes`` and ``tolerance``.
        seed: of the probes and of the first vector of the Lanczos iteration.

    Raises:
        ValueError: for an unknown part, and as ``hessian_vector_product``.
    """
    if unknown := set(which) - set(PARTS):
        raise ValueError(f"which must be of {list(PARTS)}, got {sorted(unknown)}")
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
    """The rise of the loss after a step of each length along one gradient."""
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
    """Accuracy and what the classifier's input and output tell."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.update(feature=args[0], logits=output)

    def measure(model: nn.Module, batch: Any) -> list[Tensor]:
        seen.clear()
        try:
            answer, target = logits_of(model(batch[0])), batch[1]
        except TypeError:  # an output of a kind of its own
            return []
        labels = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
        if not labels or not isinstance(answer, Tensor) or answer.ndim != 2 or answer.shape[1] < 2:
            return []  # no classification
        feature, logits = seen.get("feature", answer[:, :0]), seen.get("logits", answer)
        if feature.ndim != 2 or len(feature) != len(answer) or logits.shape != answer.shape:
            feature, logits = answer[:, :0], answer
        # else it is another network's, or something is done to the logits
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
