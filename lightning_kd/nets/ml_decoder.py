"""A head that answers each class by a query of its own, from a map of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers

__all__ = ["LabelOutput", "MLDecoder", "MLDecoderNetwork", "with_ml_decoder"]


class MLDecoder(nn.Module):
    """One layer of a decoder without self-attention, with one fixed query a class (Ridnik et al., arXiv 2111.12933).

    The map becomes tokens, ``relu(embed(x))``. For the queries ``q``, with dropout everywhere: ``q = norm1(q + q)``,
    ``q = norm2(q + attention(q, tokens, tokens))``, ``q = norm3(q + linear2(relu(linear1(q))))``. The result is the
    embedding of each label, and ``logit_k = embedding_k . weight_k + bias_k``.

    Args:
        in_channels: ``F``, channels of the map.
        num_classes: ``C``.
        embedding_dim: ``L``, a multiple of ``heads``.
        heads: of the attention.
        inner_dim: width between ``linear1`` and ``linear2``.
        dropout: in [0, 1).

    Attributes:
        queries: ``[C, L]``, drawn once and never trained.
        weight: ``[C, L]``, each class its own.
        bias: ``[C]``.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        embedding_dim: int = 768,
        heads: int = 8,
        inner_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_numbers(least=1, whole=True, in_channels=in_channels, num_classes=num_classes, heads=heads)
        check_numbers(least=1, whole=True, embedding_dim=embedding_dim, inner_dim=inner_dim)
        check_numbers(least=0, below=1, dropout=dropout)
        if embedding_dim % heads:
            raise ValueError(f"embedding_dim must be a multiple of heads={heads}, got {embedding_dim}: change either")
        self.embed = nn.Linear(in_channels, embedding_dim)
        self.queries = nn.Parameter(torch.randn(num_classes, embedding_dim), requires_grad=False)
        self.attention = nn.MultiheadAttention(embedding_dim, heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(embedding_dim, inner_dim)
        self.linear2 = nn.Linear(inner_dim, embedding_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embedding_dim) for _ in range(3))
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, embedding_dim)))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.dropout = dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C]`` and embeddings ``[B, C, L]``.

        Args:
            features: a map ``[B, F, h, w]``, or tokens ``[B, S, F]``.
        """
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        tokens = self.embed(tokens).relu()
        query = self.queries.expand(tokens.shape[0], -1, -1)  # len() would be a constant in an exported file
        query = self.norm1(query + self._drop(query))
        query = self.norm2(query + self._drop(self.attention(query, tokens, tokens, need_weights=False)[0]))
        query = self.norm3(query + self._drop(self.linear2(self._drop(self.linear1(query).relu()))))
        return (query * self.weight).sum(2) + self.bias, query


class LabelOutput(NamedTuple):
    """``logits`` ``[B, C]`` and ``embeddings`` ``[B, C, L]``, one of each label."""

    logits: Tensor
    embeddings: Tensor


class MLDecoderNetwork(nn.Module):
    """Any network with a map of features, and an ``MLDecoder`` in the place of what follows the map.

    What follows it in the network is not trained: its last ``nn.Linear`` is taken out, and whatever else has no part in
    the map is frozen. By name it is ``NAME+ml_decoder``, or ``NAME+ml_decoder_64`` for embeddings of 64 values.

    Args:
        network: takes images; it is changed in place.
        num_classes: ``C``.
        input_shape: ``(channels, height, width)`` of the images.
        feature_map: module path of what gives the map ``[B, F, h, w]``, or tokens ``[B, S, F]``. Default: the last
            part with weights that gives a map, as the last stage does.
        embedding_dim: see ``MLDecoder``, as the following.
        heads: of the attention.
        inner_dim: width of the layer between.
        dropout: in [0, 1).

    Attributes:
        network: as given, without its classifier.
        head: the ``MLDecoder``.

    Raises:
        ValueError: where there is no map, for an unknown path, and for numbers out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        input_shape: Sequence[int] = (3, 32, 32),
        feature_map: str | None = None,
        embedding_dim: int = 768,
        heads: int = 8,
        inner_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        path, found = _find_map(network, tuple(input_shape), feature_map)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if trained and found.requires_grad:
            gradients = torch.autograd.grad(found.sum(), trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.requires_grad_(gradient is not None)  # or several processes would wait for its gradient
        _take_out_classifier(network)
        self.num_classes = num_classes
        self.feature_map = path
        self.network = network
        channels = found.shape[1 if found.ndim == 4 else 2]
        self.head = MLDecoder(channels, num_classes, embedding_dim, heads, inner_dim, dropout)
        self._map: Tensor | None = None
        # a method of this object, which a deep copy binds to the copy
        network.get_submodule(path).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._map = output

    def forward(self, image: Tensor) -> LabelOutput:
        """Logits ``[B, C]`` and embeddings ``[B, C, L]`` of images ``[B, channels, H, W]``."""
        self.network(image)
        features, self._map = self._map, None  # or its graph would be kept
        assert features is not None
        return LabelOutput(*self.head(features))


def with_ml_decoder(
    network: nn.Module,
    num_classes: int,
    input_shape: Sequence[int] = (3, 32, 32),
    feature_map: str | None = None,
    **head: Any,
) -> MLDecoderNetwork:
    """``network`` with an ``MLDecoder`` as its head; see ``MLDecoderNetwork``, whose arguments these are."""
    return MLDecoderNetwork(network, num_classes, input_shape, feature_map, **head)


def _find_map(network: nn.Module, shape: tuple[int, ...], path: str | None) -> tuple[str, Tensor]:
    """Path and output of the map, from a pass of one black image; modes, weights and statistics stay as they are."""
    modules = dict(network.named_modules())
    if path is not None and (path not in modules or not path):
        known = [name for name in modules if name and name.count(".") == path.count(".")]
        raise ValueError(f"feature_map must be a module of {type(network).__name__}, got {path!r}; known: {known[:12]}")
    if len(shape) != 3:
        raise ValueError(f"input_shape must be (channels, height, width), got {shape}: a map of features needs images")
    names = [path] if path else [n for n, m in modules.items() if n and next(m.parameters(), None) is not None]
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.pop(name, None)  # in the order of the latest calls
                outputs[name] = output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    training = [module for module in modules.values() if module.training]
    first = next(network.parameters(), torch.empty(0))
    try:
        network.eval()
        # where images are so small that maps have one pixel, larger ones tell a map from what is pooled
        for size in ((max(shape[1], 64), max(shape[2], 64)), shape[1:]):
            outputs.clear()
            try:
                network(torch.zeros(2, shape[0], *size, dtype=first.dtype, device=first.device))
            except RuntimeError:
                if size == shape[1:]:
                    raise
                continue
            break
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    for name, output in reversed(outputs.items()):
        if (output.ndim == 4 and min(output.shape[2:]) > 1) or (path and output.ndim in (3, 4)):
            return name, output
    what = f"{path!r} gives none" if path else "none is found"
    raise ValueError(
        f"{type(network).__name__} must have a map of features [B, F, h, w], {what}: name the module that gives it by "
        "feature_map"
    )


def _take_out_classifier(network: nn.Module) -> None:
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if linear and linear[-1] and not any(p.requires_grad for p in network.get_submodule(linear[-1]).parameters()):
        parent, _, name = linear[-1].rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
