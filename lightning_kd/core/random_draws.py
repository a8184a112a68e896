"""Counting the numbers drawn from torch's generator, so that a skipped computation can draw as many."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_draws", "skip_draws"]

# words that a Mersenne twister makes at once, and where torch's state holds the position and the words
_BLOCK = 624
_LEFT, _NEXT, _WORDS = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * _BLOCK)
# larger counts are not searched for: 50 million take a second
MOST = 2**28


def count_draws(before: Tensor, after: Tensor) -> int | None:
    """The number of 32-bit draws between two states of torch's CPU generator.

    Args:
        before: result of ``torch.get_rng_state`` before the draws.
        after: result of ``torch.get_rng_state`` after them.

    Returns:
        The count; ``None`` if no count up to ``MOST`` leads from one state to the other.
    """
    generator = torch.Generator()
    generator.set_state(before)
    for blocks in range(MOST // _BLOCK):
        if torch.equal(generator.get_state()[_WORDS], after[_WORDS]):
            count = blocks * _BLOCK + _place(after) - _place(before)
            generator.set_state(before)
            skip_draws(count, generator)
            return count if torch.equal(generator.get_state(), after) else None
        skip_draws(_BLOCK, generator)
    return None


def skip_draws(count: int, generator: torch.Generator | None = None) -> None:
    """Draw ``count`` 32-bit numbers and discard them.

    Args:
        count: how many.
        generator: default: torch's global one.
    """
    while count > 0:
        some = min(count, 2**20)
        torch.empty(some, dtype=torch.int32).random_(generator=generator)
        count -= some


def _place(state: Tensor) -> int:
    """The number of words of the present block that are used; all of them if the next draw makes a new block."""
    left = int(state[_LEFT].view(torch.int32))
    return _BLOCK if left == 1 else int(state[_NEXT].view(torch.int64))
