"""ML-Decoder: a classification head that computes each logit by one attention query over a feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers

__all__ = ["LabelOutput", "MLDecoder", "MLDecoderNetwork", "with_ml_decoder"]


class MLDecoder(nn.Module):
    """One transformer decoder layer without self-attention, with one fixed attention query per class.

    The feature map becomes tokens, ``relu(embed(x))``. For the queries ``q``, with dropout after each sublayer:
    ``q = norm1(q + q)``, ``q = norm2(q + attention(q, tokens, tokens))``,
    ``q = norm3(q + linear2(relu(linear1(q))))``. The result is one embedding per class, and
    ``logit_k = embedding_k . weight_k + bias_k``.

    Args:
        in_channels: ``F``, channels of the feature map.
        num_classes: ``C``, number of logits.
        embedding_dim: ``L``, size of the embeddings, a multiple of ``heads``.
        heads: number of attention heads.
        inner_dim: width between ``linear1`` and ``linear2``.
        dropout: dropout probability in [0, 1).

    Attributes:
        queries: ``[C, L]``, drawn at random once and not trained.
        weight: ``[C, L]``, one row per class.
        bias: ``[C]``.

    Raises:
        ValueError: for an argument out of range.

    Source: Ridnik et al., arXiv 2111.12933.
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
            raise ValueError(f"embedding_dim must be a multiple of heads={heads}, got {embedding_dim}: change one")
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
            features: a feature map ``[B, F, h, w]``, or tokens ``[B, S, F]``.
        """
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        tokens = self.embed(tokens).relu()
        query = self.queries.expand(tokens.shape[0], -1, -1)  # an export would fix the batch size if this were len()
        query = self.norm1(query + self._drop(query))
        query = self.norm2(query + self._drop(self.attention(query, tokens, tokens, need_weights=False)[0]))
        query = self.norm3(query + self._drop(self.linear2(self._drop(self.linear1(query).relu()))))
        return (query * self.weight).sum(2) + self.bias, query


class LabelOutput(NamedTuple):
    """The output of ``MLDecoderNetwork``.

    Attributes:
        logits: ``[B, C]``.
        embeddings: ``[B, C, L]``, one for each class.
    """

    logits: Tensor
    embeddings: Tensor


class MLDecoderNetwork(nn.Module):
    """A convolutional network (or one with tokens) with an ``MLDecoder`` on its feature map instead of its classifier.

    The network's last ``nn.Linear`` is replaced by the identity, and every parameter that the feature map does not
    depend on is frozen. In configs its name is ``NAME+ml_decoder``, or ``NAME+ml_decoder_64`` for embeddings of 64
    values.

    Args:
        network: a network for images; it is changed in place.
        num_classes: ``C``, number of logits.
        input_shape: ``(channels, height, width)`` of the images.
        feature_map: path of the module whose output is the feature map ``[B, F, h, w]``, or tokens ``[B, S, F]``.
            Default: the last module with weights whose output is a feature map larger than one pixel.
        embedding_dim: as in ``MLDecoder``.
        heads: as in ``MLDecoder``.
        inner_dim: as in ``MLDecoder``.
        dropout: as in ``MLDecoder``.

    Attributes:
        network: the given network without its classifier.
        head: the ``MLDecoder``.

    Raises:
        ValueError: where no feature map is found, ``feature_map`` is not a module path, or a number is out of range.
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
                parameter.requires_grad_(gradient is not None)  # DDP fails on trainable parameters without a gradient
        _take_out_classifier(network)
        self.num_classes = num_classes
        self.feature_map = path
        self.network = network
        channels = found.shape[1 if found.ndim == 4 else 2]
        self.head = MLDecoder(channels, num_classes, embedding_dim, heads, inner_dim, dropout)
        self._map: Tensor | None = None
        # a bound method, not a closure: a deep copy of the network then has a hook that writes to the copy
        network.get_submodule(path).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._map = output

    def forward(self, image: Tensor) -> LabelOutput:
        """Logits ``[B, C]`` and embeddings ``[B, C, L]`` of images ``[B, channels, H, W]``."""
        self.network(image)
        features, self._map = self._map, None  # else the autograd graph would stay in memory
        assert features is not None
        return LabelOutput(*self.head(features))


def with_ml_decoder(
    network: nn.Module,
    num_classes: int,
    input_shape: Sequence[int] = (3, 32, 32),
    feature_map: str | None = None,
    **head: Any,
) -> MLDecoderNetwork:
    """``network`` with an ``MLDecoder`` as its head; the arguments are those of ``MLDecoderNetwork``."""
    return MLDecoderNetwork(network, num_classes, input_shape, feature_map, **head)


def _find_map(network: nn.Module, shape: tuple[int, ...], path: str | None) -> tuple[str, Tensor]:
    """Path and output of the module that gives the feature map, found by a forward pass of two black images.

    The network's modes, weights and batch-normalisation statistics stay unchanged.
    """
    modules = dict(network.named_modules())
    if path is not None and (path not in modules or not path):
        known = [name for name in modules if name and name.count(".") == path.count(".")]
        raise ValueError(f"feature_map must be a module of {type(network).__name__}, got {path!r}; known: {known[:12]}")
    if len(shape) != 3:
        raise ValueError(f"input_shape must be (channels, height, width), got {shape}: a feature map needs images")
    names = [path] if path else [n for n, m in modules.items() if n and next(m.parameters(), None) is not None]
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.pop(name, None)  # so that the dict is ordered by the latest call
                outputs[name] = output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    training = [module for module in modules.values() if module.training]
    first = next(network.parameters(), torch.empty(0))
    try:
        network.eval()
        # tried first at 64 pixels or more: on small images even a feature map can be one pixel, like a pooled feature
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
    what = f"the output of {path!r} is none" if path else "none was found"
    raise ValueError(
        f"{type(network).__name__} must have a feature map [B, F, h, w], but {what}: set feature_map to the path of "
        "the module that outputs it"
    )


def _take_out_classifier(network: nn.Module) -> None:
    """Replaces the last linear layer by the identity, unless it is trainable (the map depends on it)."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if linear and linear[-1] and not any(p.requires_grad for p in network.get_submodule(linear[-1]).parameters()):
        parent, _, name = linear[-1].rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
