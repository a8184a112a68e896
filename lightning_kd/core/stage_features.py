"""The feature maps of any network, stage by stage, for methods that compare the features of two networks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_kd.core.feature_hooks import PooledFeature, Tap, check_not_compiled
from lightning_kd.core.trial_pass import Call, trial_pass

__all__ = ["StageFeatures", "StageMaps", "StageShapes"]

_NUMBERED = re.compile(r"(.*\.)?(layer|stage|block|denseblock|s|stages\.)(\d+)")


class StageMaps(NamedTuple):
    """The features of a network for the latest batch."""

    #: the map of each stage after its last activation, ``[B, C, H, W]``
    maps: tuple[Tensor, ...]
    #: the maps before that activation; empty with ``before=False``
    before: tuple[Tensor, ...]
    #: the input of the first stage, or the output of the network's stem; ``None`` if that is the image, or not known
    stem: Tensor | None
    #: the input of the classifier, ``[B, D]``; ``None`` without a linear classifier
    pooled: Tensor | None


class StageShapes(NamedTuple):
    """The shapes of ``StageMaps``, without the batch dimension."""

    maps: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    stem: tuple[int, ...] | None
    pooled: tuple[int, ...] | None


@dataclass
class _Place:
    """The place where a map is read in every pass: the input or the output of a module."""

    call: Call
    side: str

    @property
    def value(self) -> Tensor:
        value = self.call.given if self.side == "input" else self.call.output
        assert value is not None
        return value

    @property
    def channels_last(self) -> bool:
        return self.call.given_last if self.side == "input" else self.call.output_last

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_channels_first(self.value, self.channels_last).shape[1:])

    def tap(self, network: nn.Module) -> _MapTap:
        seen = self.call.given_version if self.side == "input" else self.call.output_version
        tap = Tap(network, self.call.path, self.side, copy=self.value._version != seen)
        return _MapTap(tap, self.channels_last)


class _MapTap(NamedTuple):
    """A tap that gives maps as ``[B, C, H, W]``."""

    tap: Tap
    channels_last: bool

    def pop(self) -> Tensor:
        return _channels_first(self.tap.pop(), self.channels_last)


def _channels_first(value: Tensor, channels_last: bool) -> Tensor:
    return value.permute(0, 3, 1, 2) if channels_last else value


class StageFeatures:
    """The feature maps of a network's stages in the latest forward pass, with the autograd graph.

    The stages are the given ones; else those in the network's attribute ``feature_stages``, a list of module paths with
    the stem first; else two or more modules of one parent called ``layer1``, ``layer2`` ... (or ``stage``, ``block``,
    ``denseblock``, ``s``, ``stages.0``); else the last module at each height and width, except pooling.

    A map is read after the activation that ends the stage or directly follows it; if there is none, as in
    pre-activation networks and after linear bottlenecks, it is the output of the stage. The map before the activation
    is the input of that activation; without one it is the output of a batch normalisation that directly follows the
    stage, else the output of the stage. These are the places of the usual distillation benchmark. A block that does
    more after its activation, such as shuffling channels, may name the activation in an attribute
    ``feature_activation``. Maps with the channels in the last dimension, as in Swin, are given as ``[B, C, H, W]``.

    All this is found by one forward pass of one image in eval mode, on the network's device, which does not change
    statistics, modes and random generators. The network may be compiled or distributed later, and run with or without
    gradient.

    Args:
        network: the network, not compiled yet. For a ``FrozenTeacher`` give ``teacher.network``.
        input_shape: shape of one image of this network, ``(C, H, W)``, or of one feature row ``(D,)``.
        stages: module paths, as in ``network.named_modules()``, from shallow to deep. Default: found as above. An empty
            list gives the pooled feature alone, which networks of feature rows have too.
        before: whether to read the maps before the activation too.

    Raises:
        ValueError: for an unknown path, or one whose output is no map ``[B, C, H, W]``; if no stages are found; with
            ``before``, for a stage that ends in an activation that is not a module.
        RuntimeError: if the network is compiled.
    """

    #: the shapes of the result of ``pop``
    shapes: StageShapes

    def __init__(
        self,
        network: nn.Module,
        input_shape: Sequence[int],
        stages: Sequence[str] | None = None,
        before: bool = False,
    ) -> None:
        check_not_compiled(network, "stages")
        self.name = type(network).__name__
        linear = any(isinstance(module, nn.Linear) for module in network.modules())
        self._pooled = PooledFeature(network) if linear else None
        calls = trial_pass(network, input_shape)
        self.paths, stem = _find_stages(self.name, calls, network, stages)
        pairs = [_sides(self.name, calls, path, network) for path in self.paths]
        hidden = [path for path, pair in zip(self.paths, pairs, strict=True) if pair[1] is None]
        if before and hidden:
            raise ValueError(
                f"stage {hidden[0]!r} of {self.name} ends in an activation that is no module, so the map before it "
                "cannot be read: make it an nn.ReLU, or name other stages"
            )
        places = [pair[0] for pair in pairs]
        befores = [pair[1] for pair in pairs if before and pair[1] is not None]
        self._maps = [place.tap(network) for place in places]
        self._before = [place.tap(network) for place in befores]
        self._stem = None if stem is None else stem.tap(network)
        shape = None
        if self._pooled is not None:
            try:
                shape = tuple(self._pooled.pop().shape[1:])
            except RuntimeError:  # the forward pass does not use that layer
                self._pooled = None
        shapes = [tuple(place.shape for place in some) for some in (places, befores)]
        self.shapes = StageShapes(shapes[0], shapes[1], None if stem is None else stem.shape, shape)

    def pop(self) -> StageMaps:
        """The features of the latest forward pass, once: they are then dropped, so that the graph can be freed.

        Raises:
            RuntimeError: if there was no forward pass since the last call.
        """
        maps, before = (tuple(tap.pop() for tap in taps) for taps in (self._maps, self._before))
        stem, pooled = (None if tap is None else tap.pop() for tap in (self._stem, self._pooled))
        return StageMaps(maps, before, stem, pooled)


def _find_stages(
    name: str, calls: list[Call], network: nn.Module, stages: Sequence[str] | None
) -> tuple[list[str], _Place | None]:
    """The paths of the stages, and the place of the stem's output."""
    if stages is not None:
        return list(stages), None
    for path, module in network.named_modules():
        declared = getattr(module, "feature_stages", None)
        if declared is not None:
            stem, *rest = (f"{path}.{stage}" if path else stage for stage in declared)
            return rest, _Place(_called(name, calls, stem, network), "output")
    paths = _numbered(calls)
    if paths:
        first, image = _called(name, calls, paths[0], network), calls[-1].given
        known = first.given is not None and first.given.ndim == 4 and first.given is not image
        return paths, _Place(first, "input") if known else None
    paths = _last_of_each_size(calls)
    if not paths:
        raise ValueError(
            f"{name} has no maps [B, C, H, W] of several sizes: give a network of images, or name its stages by their "
            "module paths"
        )
    return paths, None


def _numbered(calls: list[Call]) -> list[str]:
    """The paths of modules whose names differ in a number alone and that give maps; of several such groups, the
    outermost."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for call in calls:
        match = _NUMBERED.fullmatch(call.path)
        if match and call.is_map:
            groups.setdefault((match[1] or "", match[2]), {})[int(match[3])] = call.path
    several = [(key, group) for key, group in groups.items() if len(group) > 1]
    if not several:
        return []
    _, group = min(several, key=lambda item: item[0][0].count("."))
    return [group[number] for number in sorted(group)]


def _last_of_each_size(calls: list[Call]) -> list[str]:
    """The last module at each height and width, the outermost of those with the same output; no pooling, no vectors."""
    pooled = {id(call.output) for call in calls if call.leaf and "Pool" in type(call.module).__name__}
    halving = {call.path: call.given_size for call in calls if _halves(call)}
    last: dict[torch.Size, str] = {}
    for call in calls:
        size = call.size
        if not call.path or size is None or id(call.output) in pooled:
            continue
        # modules in the first block of the next stage that still have the old size do not belong to this stage
        begun = any(call.path.startswith(f"{path}.") and size == before for path, before in halving.items())
        if size.numel() > 1 and not begun:
            last[size] = call.path
    return list(last.values())


def _halves(call: Call) -> bool:
    """Whether a block (not a whole backbone, which reduces further) about halves the height of its map."""
    given, size = call.given_size, call.size
    return not call.leaf and given is not None and size is not None and size[0] < given[0] <= 2 * size[0]


def _called(name: str, calls: list[Call], path: str, network: nn.Module) -> Call:
    """The last call of the module at ``path``."""
    for call in reversed(calls):
        if call.path == path:
            if not call.is_map:
                got = "no tensor" if call.output is None else list(call.output.shape)
                raise ValueError(f"stage {path!r} of {name} must give a map [B, C, H, W], got {got}: name another")
            return call
    Tap(network, path).handle.remove()  # raises if there is no such module
    raise ValueError(f"stage {path!r} of {name} is never called: name another module")


def _sides(name: str, calls: list[Call], path: str, network: nn.Module) -> tuple[_Place, _Place | None]:
    """The places of the stage's map, and of the map before its activation; ``None`` if that cannot be read."""
    stage = _called(name, calls, path, network)
    end, plain = calls.index(stage), _Place(stage, "output")
    final = {call.path: call for call in calls}  # taps give the last call of a module that is called more than once
    for call in reversed(calls[: end + 1]):
        if call.output is stage.output:
            own = getattr(call.module, "feature_activation", None)
            if own is not None:
                return plain, _Place(final[f"{call.path}.{own}"], "input")
            if call.is_activation and final[call.path] is call:
                return plain, _Place(call, "input")
    for call in calls[end + 1 :]:
        if call.leaf and call.given is stage.output and final[call.path] is call:
            if call.is_activation:
                return _Place(call, "output"), plain
            if isinstance(call.module, nn.modules.batchnorm._BatchNorm):
                return plain, _Place(call, "output")
            break
    assert stage.output is not None
    return plain, None if bool((stage.output >= 0).all()) else plain
