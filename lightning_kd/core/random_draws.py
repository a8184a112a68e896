"""How many numbers something drew from torch's generator, so that they can be drawn again without doing it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_draws", "skip_draws"]

# what a Mersenne twister makes at once, and where torch's state has its place among them and their words
_BLOCK = 624
_LEFT, _NEXT, _WORDS = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * _BLOCK)
# of more draws the count is not looked for: it takes a second for 50 million
MOST = 2**28


def count_draws(before: Tensor, after: Tensor) -> int | None:
    """How many draws of 32 bits lie between two states of torch's generator on the CPU.

    Args:
        before: what ``torch.get_rng_state`` gave first.
        after: and later.

    Returns:
        The count; ``None`` where none up to ``MOST`` leads from one to the other.
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
    """Draw so many numbers of 32 bits and forget them; from torch's own generator where none is given."""
    while count > 0:
        some = min(count, 2**20)
        torch.empty(some, dtype=torch.int32).random_(generator=generator)
        count -= some


def _place(state: Tensor) -> int:
    """How many words of its block a state has given away; all, where the next draw makes new ones."""
    left = int(state[_LEFT].view(torch.int32))
    return _BLOCK if left == 1 else int(state[_NEXT].view(torch.int64))
