"""The feature maps of any network, stage by stage, for methods that compare two networks inside."""

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
    """What the stages of a network gave for the latest batch."""

    #: of each stage after its last activation, ``[B, C, H, W]``
    maps: tuple[Tensor, ...]
    #: the same before that activation; empty unless it is asked for
    before: tuple[Tensor, ...]
    #: what the first stage gets, or the stem that the network names; ``None`` where that is the image, or not known
    stem: Tensor | None
    #: what the classifier gets, ``[B, D]``; ``None`` without a linear classifier
    pooled: Tensor | None


class StageShapes(NamedTuple):
    """The shapes of ``StageMaps``, without the batch."""

    maps: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    stem: tuple[int, ...] | None
    pooled: tuple[int, ...] | None


@dataclass
class _Place:
    """Where a map is seen in every pass: on one side of a module."""

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
    """A tap whose maps are ``[B, C, H, W]``."""

    tap: Tap
    channels_last: bool

    def pop(self) -> Tensor:
        return _channels_first(self.tap.pop(), self.channels_last)


def _channels_first(value: Tensor, channels_last: bool) -> Tensor:
    return value.permute(0, 3, 1, 2) if channels_last else value


class StageFeatures:
    """Listens to the stages of a network: their maps in the latest forward pass, with its graph.

    The stages are those that are given; else those that the network names, by an attribute ``feature_stages`` of module
    paths, the stem first; else two or more modules side by side called ``layer1``, ``layer2`` ... (``stage``,
    ``block``, ``denseblock``, ``s``, ``stages.0``); else the last module at each height and width, but for pooling.

    A map is taken after the activation that ends the stage, or that follows it at once. Where none does, as in networks
    that activate first and after linear bottlenecks, it is the stage's output. Before: what went into that activation;
    without one what a batch normalisation makes of the output that follows at once, else the output itself. That is
    where the usual benchmark of distillation takes them. A block that does more after its activation, such as to
    shuffle channels, may name it by an attribute ``feature_activation``. Maps of networks that have the channels in the
    last dimension, as Swin has, are seen as ``[B, C, H, W]``, too.

    One pass in eval mode over one image, on the network's device, finds all that, and leaves statistics, modes and
    random generators as they were. Taps go where the network is compiled or distributed later; it may run with gradient
    or without.

    Args:
        network: to listen to, before it is compiled. Of a ``FrozenTeacher`` it is ``teacher.network``.
        input_shape: of one image that this network gets, ``(C, H, W)``, or of one row ``(D,)``.
        stages: module paths, as in ``network.named_modules()``, from shallow to deep. Default: found, see above. An
            empty list for the pooled feature alone, which networks of rows have, too.
        before: whether the maps before the activation are wanted, too.

    Raises:
        ValueError: for a path that names no module, or one that gives no map ``[B, C, H, W]``; where no stages are
            found; with ``before`` for a stage that ends in an activation that is no module.
        RuntimeError: if the network is compiled already.
    """

    #: the shapes of what ``pop`` gives
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
                f"stage {hidden[0]!r} of {self.name} ends in an activation that is no module, so that what is before "
                "it cannot be seen: make it an nn.ReLU, or name other stages"
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
            except RuntimeError:  # no layer that the image passes through
                self._pooled = None
        shapes = [tuple(place.shape for place in some) for some in (places, befores)]
        self.shapes = StageShapes(shapes[0], shapes[1], None if stem is None else stem.shape, shape)

    def pop(self) -> StageMaps:
        """The maps of the latest forward pass; the taps let go of them, so that the graph can be freed.

        Raises:
            RuntimeError: if there was none since the last time.
        """
        maps, before = (tuple(tap.pop() for tap in taps) for taps in (self._maps, self._before))
        stem, pooled = (None if tap is None else tap.pop() for tap in (self._stem, self._pooled))
        return StageMaps(maps, before, stem, pooled)


def _find_stages(
    name: str, calls: list[Call], network: nn.Module, stages: Sequence[str] | None
) -> tuple[list[str], _Place | None]:
    """The paths of the stages, and where the stem is seen."""
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
    """Paths of modules with maps that have one name but for their number; of several such, the outermost."""
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
    """The last module at each height and width, the outermost of those that give the same; no pooling, no vectors."""
    pooled = {id(call.output) for call in calls if call.leaf and "Pool" in type(call.module).__name__}
    halving = {call.path: call.given_size for call in calls if _halves(call)}
    last: dict[torch.Size, str] = {}
    for call in calls:
        size = call.size
        if not call.path or size is None or id(call.output) in pooled:
            continue
        # what a block of the next stage does first, such as to expand, is no end of this one
        begun = any(call.path.startswith(f"{path}.") and size == before for path, before in halving.items())
        if size.numel() > 1 and not begun:
            last[size] = call.path
    return list(last.values())


def _halves(call: Call) -> bool:
    """Whether a block makes its map about half as high; a whole trunk makes it less."""
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
    Tap(network, path).handle.remove()  # says so where there is no such module
    raise ValueError(f"stage {path!r} of {name} is never called: name another module")


def _sides(name: str, calls: list[Call], path: str, network: nn.Module) -> tuple[_Place, _Place | None]:
    """Where the stage's map is seen, and where what is before its activation; ``None`` where that cannot be seen."""
    stage = _called(name, calls, path, network)
    end, plain = calls.index(stage), _Place(stage, "output")
    final = {call.path: call for call in calls}  # of modules that are called more than once, taps see the last call
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
