"""Images of other classes that an image is compared with, drawn for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NegativeImages"]

# random numbers that are drawn at once, at most
AT_ONCE = 2**24


class NegativeImages:
    """Draws rows of other classes: ``negatives`` different ones, or with replacement where a class has fewer others.

    Args:
        labels: int64 ``[n]``, the class of each row.
        negatives: ``K``, how many each sample gets.

    Raises:
        ValueError: where all are of one class.
    """

    def __init__(self, labels: Tensor, negatives: int) -> None:
        self.labels, self.negatives = labels, negatives
        self._count = labels.bincount()
        self._others = len(labels) - self._count
        fewest = int(self._others[self._count > 0].min())
        if fewest == 0:
            raise ValueError("negatives need images of two classes or more, got one class: give data of more classes")
        self._too_few = fewest < negatives
        self._by_class = labels.argsort(stable=True)
        self._first = self._count.cumsum(0) - self._count

    def draw(self, target: Tensor, generator: torch.Generator, skip: int = 0) -> Tensor:
        """Rows int64 ``[B, K]`` for samples of the classes ``target`` int64 ``[B]``.

        Args:
            target: on the device of ``labels``.
            generator: on that device.
            skip: how many samples others draw for before, from an equal generator.
        """
        count, k = len(self.labels), self.negatives
        width = max(count, k) if self._too_few else count  # as many random numbers for each sample
        size = max(1, AT_ONCE // width)

        def numbers(rows: int) -> Tensor:
            return torch.rand(rows, width, generator=generator, device=target.device)

        for begin in range(0, skip, size):
            numbers(min(size, skip - begin))
        return torch.cat([self._chosen(part, numbers(len(part)), count, k) for part in target.split(size)])

    def _chosen(self, target: Tensor, number: Tensor, count: int, k: int) -> Tensor:
        again = None
        if self._too_few:
            others, own = self._others[target, None], self._count[target, None]
            place = (number[:, :k] * others).long()
            place += own * (place >= self._first[target, None])  # rows by class, without those of the own
            again = self._by_class[place]
            if k > count:
                return again
        order = number[:, :count].masked_fill(self.labels == target[:, None], 2.0)
        chosen = order.topk(k, largest=False, sorted=False).indices
        return chosen if again is None else torch.where(self._others[target, None] < k, again, chosen)
