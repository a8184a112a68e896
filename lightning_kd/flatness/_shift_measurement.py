"""Passes over samples that measure loss and relative flatness and record the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_kd.core.batch import Batch, as_batch, batch_size, is_batch
from lightning_kd.core.distributed import summed
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.core.outputs import logits_of
from lightning_kd.flatness._layer_inputs import LayerInputs, undisturbed
from lightning_kd.flatness._row_space import wide

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
# modules whose output scales with their input: f(c x) = c f(x) for c > 0
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


@dataclass
class Found:
    """The result of a pass, over all processes.

    Attributes:
        samples: number of samples.
        loss: mean loss; ``None`` without targets.
        kappa: relative flatness of the classifier; ``None`` if it cannot be computed.
        finite: whether all outputs and losses are finite.
        missing: classes without samples; empty if the number of classes is unknown.
    """

    samples: int
    loss: float | None
    kappa: float | None
    finite: bool
    missing: list[int]


class Pass:
    """Runs a network over samples, measures loss and relative flatness, and records the inputs of layers.

    Args:
        model: the network.
        layers: layers by module path.
        forward: from a batch to the output. Default: ``model(image)``.
        loss_fn: from output and batch to the mean loss. Default: cross-entropy.
        num_classes: number of classes; ``None``: missing classes are not looked for.

    Attributes:
        normalised: module paths of the layers whose output enters a normalisation layer, known after a pass.
        classifier: module path of the classifier, ``""`` if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear | nn.Conv2d],
        forward: Callable[[Any], Any] | None,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        num_classes: int | None,
    ) -> None:
        self.model, self.layers = model, layers
        self.forward = forward or self._forward
        self.loss_fn = loss_fn
        self.num_classes = num_classes
        self.normalised: set[str] = set()
        try:
            self.classifier = find_classifier(model)[0]
        except ValueError:
            self.classifier = ""
        self._outputs: dict[str, list[Any]] = {}
        self._spread: Tensor | None = None
        self._inputs: Mapping[str, LayerInputs] = {}

    def run(self, data: Any, inputs: Mapping[str, LayerInputs] | None = None) -> Found:
        """One pass over ``data``; the inputs of the layers are added to ``inputs``. All processes must call it."""
        parameter = next(self.model.parameters())
        wide_like = wide(parameter.detach()[:0])
        loss, finite, samples, with_loss = wide_like.new_zeros(()), wide_like.new_ones(()), 0, 0
        one_class = True  # kappa is defined for one class a sample
        classes = torch.zeros(self.num_classes or 0, dtype=torch.int64, device=wide_like.device)
        self._inputs = inputs or {}
        head = self.layers.get(self.classifier)
        self._spread = None if head is None else wide_like.new_zeros(len(head.weight), len(head.weight) + 1)
        handles = self._listen()
        try:
            with undisturbed(self.model):
                for raw in _batches(data):
                    batch = move_data_to_device(raw, parameter.device)
                    target = _target(batch)
                    one_class &= target is not None or self.loss_fn is None
                    for part in self._inputs.values():
                        part.target = target
                    if target is not None and self.num_classes:
                        classes += self._count(target.to(classes.device))
                    output = self.forward(batch)
                    self._outputs.clear()
                    size = batch_size(batch)
                    samples += size
                    if isinstance(output, Tensor):
                        finite *= output.isfinite().all()
                    if self.loss_fn is not None or target is not None:
                        value = (self.loss_fn or _cross_entropy)(output, batch).to(loss)
                        finite *= value.isfinite()
                        loss += value * size
                        with_loss += size
        finally:
            for handle in handles:
                handle.remove()
        sums = torch.stack([loss, 1 - finite, *wide_like.new_tensor([samples, with_loss, not one_class])])
        total, wrong, all_samples, all_loss, several = summed(sums).tolist()
        if not all_samples:
            raise ValueError("there is no sample to pass through the network: give at least one batch")
        summed(classes)
        return Found(
            int(all_samples),
            total / all_loss if all_loss else None,
            None if several else self._kappa(),
            not wrong,
            (classes == 0).nonzero().flatten().tolist() if classes.any() else [],
        )

    def _kappa(self) -> float | None:
        """Relative flatness of the classifier ``[K, d]``.

        Sum over pairs of classes of the squared distance of their rows, each times the mean over samples of
        ``|feature|^2 p_k p_l``.
        """
        if self._spread is None or not summed(self._spread)[0, -1]:
            return None
        rows = wide(self.layers[self.classifier].weight).flatten(1)
        products = rows @ rows.T
        size = products.diagonal()
        apart = (size[:, None] + size - 2 * products).clamp(min=0).fill_diagonal_(0)
        return float((apart * self._spread[:, :-1]).sum() / 2 / self._spread[0, -1])

    def _forward(self, batch: Any) -> Any:
        image = batch if isinstance(batch, Tensor) else as_batch(batch).image
        dtype = next(self.model.parameters()).dtype
        return self.model(image.to(dtype) if isinstance(image, Tensor) and image.is_floating_point() else image)

    def _count(self, target: Tensor) -> Tensor:
        low, high = int(target.min()), int(target.max())
        assert self.num_classes is not None
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"target must be in 0..{self.num_classes - 1}, got {low}..{high}: leave out samples without a class"
            )
        return torch.bincount(target, minlength=self.num_classes)

    def _listen(self) -> list[Any]:
        handles = []
        for name, module in self.layers.items():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name), with_kwargs=True))
        norms = [module for module in self.model.modules() if isinstance(module, _NORMS)]
        handles += [norm.register_forward_pre_hook(self._normalising) for norm in norms]
        between = [module for module in self.model.modules() if isinstance(module, _HOMOGENEOUS)]
        handles += [module.register_forward_hook(self._passing) for module in between]
        return handles

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self._inputs:
                self._inputs[name].add(args[0] if args else kwargs["input"])

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._outputs[name] = [output]  # kept until the forward ends: tensors are recognised by identity
            if self._spread is not None and name == self.classifier and output.ndim == 2:
                size, p = wide(args[0] if args else kwargs["input"]).square().sum(1), wide(output).softmax(1)
                self._spread[:, :-1].addmm_((size[:, None] * p).T, p)
                self._spread[:, -1] += len(output)

        return hook

    def _normalising(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.normalised |= {name for name, found in self._outputs.items() if _first_is_in(args, found)}

    def _passing(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for found in self._outputs.values():
            if _first_is_in(args, found):
                found.append(output)


def _first_is_in(args: tuple[Any, ...], found: list[Any]) -> bool:
    return bool(args) and any(args[0] is tensor for tensor in found)


# -- batches -----------------------------------------------------------------------------------------------------------


def _batches(data: Any) -> Iterator[Any]:
    """The batches of ``data``: a single batch, or those of a loader."""
    if is_batch(data, targets=False):
        return iter([data])
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise ValueError(
            f"samples must be a batch, or batches that can be iterated more than once, got {type(data).__name__}: give "
            "a list or a loader"
        )
    return iter(data)


def _target(batch: Any) -> Tensor | None:
    if isinstance(batch, Batch) or (isinstance(batch, Sequence) and 2 <= len(batch) <= 4):
        target = as_batch(batch).target
        return target if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point() else None
    return None


def _cross_entropy(output: Any, batch: Any) -> Tensor:
    output, target = logits_of(output), as_batch(batch).target
    if output.ndim != 2 or len(output) != len(target):
        got = list(output.shape)
        raise ValueError(f"the output must be logits [{len(target)}, C] for cross-entropy, got {got}: give loss_fn")
    return F.cross_entropy(wide(output), target.to(wide(output).device))
