"""Early exits: small classifiers on the stages of a network, which learn from the output of the whole network."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.core.feature_hooks import Tap
from lightning_kd.core.module_modes import eval_mode

__all__ = ["find_stages"]

# names of stages in this package, torchvision and timm: layer1, block0, stages.2, features.5 ...
_STAGE = re.compile(r"(?P<family>(?:.+\.)?(?:layer|block|stage|layers\.|blocks\.|stages\.|features\.))(?P<number>\d+)")


def find_stages(
    network: nn.Module, input_shape: Sequence[int], stages: Sequence[str] | None = None
) -> dict[str, tuple[int, int, int]]:
    """The stages of a network in order, with the shapes ``(C, H, W)`` of their outputs.

    Stages are modules with the same name and a number (``layer1``, ``blocks.0`` ...). Of consecutive ones with the same
    height and width only the last is a stage. Shapes come from one forward pass on zeros in eval mode, which does not
    change the network.

    Args:
        network: any network.
        input_shape: shape of one image, ``(C, H, W)``.
        stages: module paths to use instead, in order, including the last stage.

    Returns:
        shapes by module path.

    Raises:
        ValueError: if no stages are found; if ``stages`` has fewer than 2 names, an unknown one, or one whose output is
            not ``[B, C, H, W]``.
    """
    name = type(network).__name__
    known = dict(network.named_modules())
    if stages is not None:
        if len(stages) < 2:
            raise ValueError(f"stages must name at least 2 modules of {name}, the last stage included, got {stages}")
        for path in stages:
            if path not in known:
                children = [child for child, _ in network.named_children()]
                raise ValueError(
                    f"stages: no module {path!r} in {name}; it has {children[:12]} and their submodules: name one"
                )
        shapes = _output_shapes(network, stages, input_shape)
        for path in stages:
            if len(shapes.get(path, ())) != 3:
                raise ValueError(
                    f"stages: {path!r} of {name} gives no feature map [B, C, H, W], but {shapes.get(path, 'nothing')}: "
                    "name modules that give one"
                )
        return {path: shapes[path] for path in stages}  # type: ignore[misc]
    families: dict[str, list[tuple[int, str]]] = {}
    for path in known:
        if match := _STAGE.fullmatch(path):
            families.setdefault(match["family"], []).append((int(match["number"]), path))
    paths = [path for members in families.values() for _, path in members]
    shapes = _output_shapes(network, paths, input_shape) if paths else {}
    for members in sorted(families.values(), key=lambda m: m[0][1].count(".")):
        maps = [(path, shapes[path]) for _, path in sorted(members) if len(shapes.get(path, ())) == 3]
        last = [m for m, after in zip(maps, [*maps[1:], None], strict=True) if not after or m[1][1:] != after[1][1:]]
        if len(last) > 1:
            return dict(last)  # type: ignore[arg-type]
    raise ValueError(
        f"{name} has no stages that are found by name (layer1, block1, stages.0 ...), for inputs {tuple(input_shape)}: "
        "list their module paths in stages, including the last one, or use a convolutional network"
    )


def _output_shapes(network: nn.Module, paths: Sequence[str], input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs of some modules, without the batch dimension; no entry if the output is no tensor."""
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(path: str, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[path] = tuple(output.shape[1:])

    modules = dict(network.named_modules())
    handles = [modules[p].register_forward_hook(lambda m, args, out, p=p: keep(p, out)) for p in paths]  # type: ignore[misc]
    like = next(network.parameters(), torch.zeros(()))
    try:
        with eval_mode(network), torch.no_grad():
            network(like.new_zeros(1, *input_shape))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


class Exit(nn.Module):
    """A small classifier on a feature map ``[B, in_channels, H, W]``: logits ``[B, C]`` and feature ``[B, features]``.

    Args:
        in_channels: number of channels of the map.
        reduction: factors by which height and width shrink: kernel size and stride of the middle convolution.
        features: length of the feature, equal to that of the network's pooled feature.
        num_classes: number of logits.
    """

    def __init__(self, in_channels: int, reduction: tuple[int, int], features: int, num_classes: int) -> None:
        super().__init__()
        width = 128  # for every network
        self.body = nn.Sequential(
            *_conv_bn_relu(in_channels, width, (1, 1)),
            *_conv_bn_relu(width, width, reduction),
            *_conv_bn_relu(width, features, (1, 1)),
        )
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = F.adaptive_avg_pool2d(self.body(x), 1).flatten(1)
        return self.fc(feature), feature


def _conv_bn_relu(in_channels: int, out_channels: int, size: tuple[int, int]) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, size, size), nn.BatchNorm2d(out_channels), nn.ReLU()]


class Exits(nn.Module):
    """An exit on each stage of a network except the last; inputs are taken from the network's latest forward pass.

    Args:
        network: the network, before compilation.
        features: length of its pooled feature.
        num_classes: number of logits.
        input_shape: shape of one image, ``(C, H, W)``.
        stages: see ``find_stages``.

    Attributes:
        stages: module paths of the stages with an exit.
    """

    def __init__(
        self,
        network: nn.Module,
        features: int,
        num_classes: int,
        input_shape: Sequence[int],
        stages: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        *early, (_, (_, height, width)) = find_stages(network, input_shape, stages).items()
        self.stages = [path for path, _ in early]
        self._taps = [Tap(network, path) for path in self.stages]
        self.exits = nn.ModuleList(
            Exit(channels, (max(h // height, 1), max(w // width, 1)), features, num_classes)
            for _, (channels, h, w) in early
        )

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Logits ``[B, C]`` and features ``[B, features]`` of each exit."""
        pairs = [exit_(tap.pop()) for exit_, tap in zip(self.exits, self._taps, strict=True)]
        return [logits for logits, _ in pairs], [feature for _, feature in pairs]
