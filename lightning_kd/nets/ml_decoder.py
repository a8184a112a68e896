"""A head that answers each class by a query of its own, from a map of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.argument_checks import check_numbers

__all__ = ["MLDecoder"]


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
        query = self.queries.expand(len(tokens), -1, -1)
        query = self.norm1(query + self._drop(query))
        query = self.norm2(query + self._drop(self.attention(query, tokens, tokens, need_weights=False)[0]))
        query = self.norm3(query + self._drop(self.linear2(self._drop(self.linear1(query).relu()))))
        return (query * self.weight).sum(2) + self.bias, query
