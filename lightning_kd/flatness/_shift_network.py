"""Optimum shifting of the layers of a network, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers
from lightning_kd.core.distributed import process_count
from lightning_kd.core.feature_hooks import find_classifier
from lightning_kd.flatness._layer_inputs import LayerInputs
from lightning_kd.flatness._row_space import Projector, check_mode, check_rtol, project, wide
from lightning_kd.flatness._shift_measurement import Found, Pass
from lightning_kd.flatness._shift_report import LayerShift, ShiftReport

SELECTIONS = ("all", "random", "class_balanced", "class_means")
MOMENTUM = ("project", "keep", "zero")


def shift_network(
    model: nn.Module,
    layers: str | Sequence[str] | None,
    data: Any,
    *,
    held_out: Any = None,
    mode: str = "fixed",
    rtol: float | None = None,
    selection: str = "all",
    num_classes: int | None = None,
    force: bool = False,
    guard: float | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    momentum: str = "project",
    forward: Callable[[Any], Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
) -> ShiftReport:
    """Replace weights of layers by the smallest ones with the same outputs on ``data``, in place.

    Each layer is shifted by ``shift_linear`` or ``shift_conv2d`` on the inputs that it gets in one pass over ``data``.
    The pass is in eval mode, without gradient and autocast. Afterwards modes, buffers, random states,
    ``requires_grad``, the ``Parameter`` objects and the keys of the ``state_dict`` are as before. A layer's inputs are
    kept if they are at most as many as the weights of one output; if more, only their Gram matrix is. The order of the
    layers does not matter: a shift does not change the inputs of later layers on ``data``.

    A layer whose output is normalised, directly or after modules such as ReLU and dropout, gains nothing from a smaller
    weight; a warning says so. Functions (not modules) in between are not detected.

    On other samples the loss may rise, and strongly if ``data`` lacks a class: give ``held_out`` and a ``guard``.

    Several processes: each gives its share of the samples; all get the shift that one process with all samples would
    compute. Sharded weights are refused.

    Args:
        model: any network; with the default ``forward`` one that takes the image of a batch.
        layers: module paths of ``nn.Linear`` and ``nn.Conv2d`` layers; a module with several paths counts once.
            ``None``: the last ``nn.Linear``.
        data: the samples to shift on: a ``Batch``, a pair ``(image, target)`` with ``target`` 1-D or of integers, a
            tensor of images, or batches that can be iterated repeatedly in the same order (no augmentation).
        held_out: further training samples, in the same form. Default: none.
        mode: ``"fixed"``, ``"joint"`` or ``"free"``, see ``shift_linear``.
        rtol: see ``shift_linear``; the default depends on the dtype of the layer's inputs.
        selection: ``"class_means"`` shifts on the mean input of each class over ``data`` (linear layers with inputs
            ``[N, d]``). Any other shifts on all of ``data`` and only names how it was drawn.
        num_classes: number of classes, each of which ``data`` must have. Default: not checked.
        force: shift although a class is missing.
        guard: undo the shift if the loss on ``held_out`` rises by more than this share of its absolute value. Default:
            never. A shift after which a loss or an output is not finite is always undone.
        optimizer: optimizers whose momentum (``momentum_buffer``, ``exp_avg``) of the layers is changed too. Second
            moments are not.
        momentum: ``"project"``: remove the part of the momentum outside the span of the inputs, which would undo the
            shift in later steps; ``"keep"`` or ``"zero"``.
        forward: from a batch of ``data`` to the output. Default: ``model(image)``.
        loss_fn: from output and batch to the mean loss over the batch. Default: cross-entropy.

    Returns:
        ``ShiftReport``.

    Raises:
        ValueError: for layers that cannot be shifted (unknown, of another kind, parametrised, with shared parameters,
            not called), inputs that are not finite or of rank 0, missing classes, arguments out of range. With
            ``"free"`` equal inputs have rank 0 (``shift_linear`` returns a weight of 0 for them). The network is then
            unchanged.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    if momentum not in MOMENTUM:
        raise ValueError(f"momentum must be one of {', '.join(MOMENTUM)}, got {momentum!r}")
    check_numbers(least=0, optional=True, guard=guard)
    if guard is not None and held_out is None:
        raise ValueError(f"guard={guard} compares the loss on held_out samples, got held_out=None: give both")
    if selection == "class_means" and num_classes is None:
        raise ValueError("selection 'class_means' needs the number of classes: give num_classes")
    check_rtol(rtol)
    found = find_layers(model, layers, mode)
    means = num_classes if selection == "class_means" else None
    inputs = {name: LayerInputs(name, module, means) for name, module in found.items()}
    watch = Pass(model, found, forward, loss_fn, num_classes)
    before = watch.run(data, inputs)
    if num_classes is not None and before.missing and not force:
        raise ValueError(
            f"the shift set lacks class {before.missing[0]}"
            + (f" and {len(before.missing) - 1} more" if len(before.missing) > 1 else "")
            + ", whose predictions a shift would destroy: give samples of all classes"
        )
    _warn(watch, found)
    maps = {name: part.projectors(mode, rtol) for name, part in inputs.items()}
    held = None if held_out is None else watch.run(held_out)
    if guard is not None and (held is None or held.loss is None):
        raise ValueError(f"guard={guard:g} compares the loss on held_out samples, whose targets are missing: give them")

    entries = []
    undo: list[tuple[Tensor, Tensor]] = []
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    try:
        for name, module in found.items():
            projectors, rows = maps[name]
            norm = float(wide(module.weight).norm())
            moved = any(p.basis is not None for p in projectors)
            if moved:
                _shift(module, projectors, mode, optimizers, momentum, undo)
            rank = [p.rank for p in projectors] if len(projectors) > 1 else projectors[0].rank
            status = "shifted" if moved else "identity"
            after_norm = float(wide(module.weight).norm())
            entries.append(LayerShift(name, mode, rows, inputs[name].dim, rank, status, norm, after_norm))
        # if no layer changed, the first pass is still valid
        after = watch.run(data) if undo else before
        held_after = watch.run(held_out) if undo and held is not None else held
    except BaseException:
        _restore(undo)
        raise
    reason = _reason(after, held, held_after, guard) if undo else ""
    if reason:
        _restore(undo)
    return ShiftReport(
        entries,
        before.samples,
        before.loss,
        after.loss,
        held.loss if held else None,
        held_after.loss if held_after else None,
        before.kappa,
        after.kappa,
        bool(reason),
        reason,
    )


def _reason(after: Found, held: Found | None, held_after: Found | None, guard: float | None) -> str:
    if not (after.finite and (held_after is None or held_after.finite)):
        return "an output or a loss is not finite after the shift"
    if guard is not None and held is not None and held_after is not None:
        assert held.loss is not None
        assert held_after.loss is not None
        if held_after.loss > held.loss + guard * abs(held.loss):
            return f"the held-out loss rises from {held.loss:.4g} to {held_after.loss:.4g}, more than guard={guard:g}"
    return ""


# -- layers ------------------------------------------------------------------------------------------------------------


def find_layers(
    model: nn.Module, layers: str | Sequence[str] | None, mode: str = "fixed"
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers by module path (the first path of each module), each checked to be one that can be shifted.

    Raises:
        ValueError: naming the first layer that cannot be shifted, and why.
    """
    names = [find_classifier(model)[0]] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    modules = dict(model.named_modules(remove_duplicate=False))
    first_names = {module: name for name, module in model.named_modules()}
    owners: dict[int, int] = {}
    for module in first_names:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name in names:
        if name not in modules:
            known = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)]
            raise ValueError(f"layers: no module {name!r} in {type(model).__name__}; it has {known[:12]}: name one")
        module = modules[name]
        found[first_names[module]] = _plain_layer(name, module, owners)
        check_mode(mode, module.bias is not None, f"at layer {name!r} there")
    if not found:
        raise ValueError("layers is empty: name a layer, or leave it out for the classifier")
    return found


def _plain_layer(name: str, module: nn.Module, owners: Mapping[int, int]) -> nn.Linear | nn.Conv2d:
    kind = type(module)
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear | nn.Conv2d):
        base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
        if weight is None or nn.utils.parametrize.is_parametrized(module):
            problem = "has a parametrised weight, which cannot be written: remove the parametrisation first"
        elif kind.forward is not base.forward or (
            isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward
        ):
            problem = f"is a {kind.__name__} with a forward of its own, which shifting does not support: name another"
        elif any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            problem = "shares its parameters with another module, which a shift would change too: name another layer"
        elif hasattr(weight, "full_tensor") or getattr(module, "_is_fsdp_managed_module", False) or not weight.numel():
            problem = "has a sharded weight: shift the whole network after training"
        elif not weight.is_floating_point():
            problem = f"has a weight of {weight.dtype}: shift the network before it is quantised"
        else:
            return module
    else:
        problem = f"is a {kind.__name__}: only nn.Linear and nn.Conv2d can be shifted"
    raise ValueError(f"layer {name!r} {problem}")


def _warn(watch: Pass, found: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
    for name in sorted(watch.normalised):
        rank_zero_warn(
            f"the output of layer {name!r} is normalised: a smaller weight does not change the outputs but makes "
            "gradient and curvature larger; leave it out"
        )
    head = found.get(watch.classifier)
    if head is not None and len(head.weight) > head.weight[0].numel() - 1:
        rank_zero_warn(
            f"classifier {watch.classifier!r} has {len(head.weight)} classes on {head.weight[0].numel()} features: "
            "samples of all classes span its inputs, so a shift changes nothing"
        )


def _shift(
    module: nn.Linear | nn.Conv2d,
    projectors: list[Projector],
    mode: str,
    optimizers: Iterable[torch.optim.Optimizer],
    momentum: str,
    undo: list[tuple[Tensor, Tensor]],
) -> None:
    """Write the shifted weight, bias and momentum; each written tensor and a copy of its old values go to ``undo``."""
    weight, bias = module.weight, module.bias if mode != "fixed" else None
    written: list[tuple[Tensor, Tensor]] = _mapped(weight, bias, projectors)
    for optimizer in optimizers if momentum != "keep" else ():
        for key in ("momentum_buffer", "exp_avg"):
            of_weight, of_bias = _state(optimizer, weight, key), _state(optimizer, bias, key)
            if of_weight is None:
                continue
            moved = _mapped(
                of_weight, of_bias if bias is None or of_bias is not None else torch.zeros_like(bias), projectors
            )
            written += [(old, torch.zeros_like(old) if momentum == "zero" else new) for old, new in moved]
    with torch.no_grad():
        for values, new in written:
            undo.append((values, values.detach().clone()))
            values.copy_(new)
            if process_count() > 1:
                dist.broadcast(values.detach(), 0)


def _mapped(weight: Tensor, bias: Tensor | None, projectors: list[Projector]) -> list[tuple[Tensor, Tensor]]:
    new_weight, new_bias = project(weight, bias, projectors)
    return [(weight, new_weight), *([] if bias is None or new_bias is None else [(bias, new_bias)])]


def _restore(undo: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for values, old in undo:
            values.copy_(old)


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor | None, key: str) -> Tensor | None:
    if parameter is None or parameter not in optimizer.state:
        return None
    value = optimizer.state[parameter].get(key)
    return value if isinstance(value, Tensor) else None
