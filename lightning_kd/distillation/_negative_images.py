"""Draw negative images, images of other classes, for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NegativeImages"]

# largest number of random numbers that are drawn at once
AT_ONCE = 2**24


class NegativeImages:
    """Draws ``negatives`` images of other classes for each sample.

    They are drawn without replacement, or with replacement if there are fewer images of other classes.

    Args:
        labels: int64 ``[n]``, the class of each training image.
        negatives: ``K``, number of negatives per sample.

    Raises:
        ValueError: if all images have the same class.
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
        """Draw rows, int64 ``[B, K]``, for samples of the classes ``target``.

        Args:
            target: int64 ``[B]``, on the device of ``labels``.
            generator: source of the random numbers, on the same device.
            skip: number of samples for which processes of lower rank draw from an equal generator; their numbers are
                skipped.
        """
        count, k = len(self.labels), self.negatives
        width = max(count, k) if self._too_few else count  # the same for each sample
        size = max(1, AT_ONCE // width)

        def numbers(rows: int) -> Tensor:
            return torch.rand(rows, width, generator=generator, dtype=torch.float32, device=target.device)

        for begin in range(0, skip, size):
            numbers(min(size, skip - begin))
        return torch.cat([self._chosen(part, numbers(len(part)), count, k) for part in target.split(size)])

    def _chosen(self, target: Tensor, number: Tensor, count: int, k: int) -> Tensor:
        again = None
        if self._too_few:
            others, own = self._others[target, None], self._count[target, None]
            place = (number[:, :k] * others).long()
            place += own * (place >= self._first[target, None])  # rows sorted by class, without the own one
            again = self._by_class[place]
            if k > count:
                return again
        order = number[:, :count].masked_fill(self.labels == target[:, None], 2.0)
        chosen = order.topk(k, largest=False, sorted=False).indices
        return chosen if again is None else torch.where(self._others[target, None] < k, again, chosen)
