"""Compare the distances between embeddings of a student with those of a teacher, for the losses of L2D."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["sum_over_groups"]

# largest number of values that are computed at once: 64 MiB in float32
AT_ONCE = 2**24


def sum_over_groups(student: Tensor, teacher: Tensor, there: Tensor, by_class: bool) -> Tensor:
    """The sum of the loss ``H`` (see ``class_aware_loss``) over groups of embeddings.

    Only pairs within a group are computed, since most images have few of all labels.

    Args:
        student: embeddings ``[B, C, L]``.
        teacher: embeddings ``[B, C, L']``.
        there: bool ``[B, C]``, which labels each image has.
        by_class: if true, a group is the images that have a class, else the classes that an image has.

    Returns:
        Scalar.
    """
    rows = torch.arange(there.numel(), device=there.device).view_as(there)
    if by_class:
        rows, there = rows.T, there.T
    size = max(1, AT_ONCE // there.shape[1] ** 2)
    embeddings = student.flatten(0, 1), teacher.flatten(0, 1)
    parts = zip(rows.split(size), there.split(size), strict=True)
    return torch.stack([_sum_of_groups(*embeddings, *part) for part in parts]).sum()


def _sum_of_groups(student: Tensor, teacher: Tensor, rows: Tensor, there: Tensor) -> Tensor:
    """The sum of ``H`` over ``G`` groups: members are ``rows`` ``[G, N]`` of the embeddings where ``there`` is true."""
    pairs = (there[:, :, None] & there[:, None, :]).triu(1)  # each pair once
    group, first, second = pairs.nonzero(as_tuple=True)
    place = (there.flatten().cumsum(0) - 1).view_as(there)  # position among all members
    count = pairs.sum((1, 2)).clamp(min=1)
    scaled = []
    for embedding in (student, teacher):
        d = _distances(embedding.index_select(0, rows[there]), place[group, first], place[group, second])
        mean = d.new_zeros(len(there)).index_add(0, group, d) / count
        scaled.append(d / mean[group])
    loss = F.huber_loss(scaled[0], scaled[1], reduction="none")
    return (2 * loss / there.sum(1)[group]).sum()  # keeps a graph even without any pair


def _distances(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Distances between pairs of rows, from differences: a matrix product would be inexact for small distances."""

    def of(one: Tensor, other: Tensor) -> Tensor:
        difference = rows.index_select(0, one) - rows.index_select(0, other)
        return torch.linalg.vector_norm(difference, dim=1).clamp(min=1e-6)

    size = max(1, AT_ONCE // rows.shape[1])
    if len(first) <= size:
        return of(first, second)
    # checkpointed: differences of many pairs are computed again for the gradient, to save memory
    parts = zip(first.split(size), second.split(size), strict=True)
    return torch.cat([checkpoint(of, *part, use_reentrant=False) for part in parts])
