"""Random generators whose seeds are derived from names and numbers, so that a resumed run draws the same numbers."""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import lightning as L
import numpy as np
import torch


def derive_seed(seed: int, stream: str, epoch: int = 0, pass_: int = 0, rank: int = 0) -> int:
    """A 63-bit seed for the random stream ``(seed, stream name, epoch, pass, rank)``.

    Different tuples give independent streams (``numpy.random.SeedSequence``); the same tuple gives the same seed on
    every machine and in every process.

    Args:
        seed: seed of the run.
        stream: name of the purpose, such as ``"shuffle"``.
        epoch: number of the epoch.
        pass_: number of the pass within the epoch.
        rank: number of the process; leave it 0 for numbers that all processes share.
    """
    entropy = [seed, zlib.crc32(stream.encode()), epoch, pass_, rank]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def numpy_generator(seed: int, stream: str, epoch: int = 0, pass_: int = 0, rank: int = 0) -> np.random.Generator:
    """A NumPy generator for the stream ``(seed, stream name, epoch, pass, rank)``, see ``derive_seed``."""
    return np.random.default_rng(derive_seed(seed, stream, epoch, pass_, rank))


def torch_generator(
    seed: int, stream: str, epoch: int = 0, pass_: int = 0, rank: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A torch generator on ``device`` for the stream ``(seed, stream, epoch, pass, rank)``, see ``derive_seed``."""
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, epoch, pass_, rank))


class EpochSeeding(L.Callback):
    """Reseed the global generators of torch, NumPy and Python at the start of each training epoch.

    Dropout and everything else that draws from a global generator then depends on (seed, epoch, rank) alone, and a run
    resumed at the end of an epoch draws the same numbers as an uninterrupted one. Every task adds this callback itself.
    The seed is that of ``seed_everything``; without one it is drawn once, shared by all processes and kept in
    checkpoints.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(global_seed()))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.seed is not None
        state = derive_seed(self.seed, "global", trainer.current_epoch, rank=trainer.global_rank)
        torch.manual_seed(state)
        np.random.seed(state % 2**32)  # noqa: NPY002  (what users draw from)
        random.seed(state)


def global_seed() -> int:
    """The seed given to ``seed_everything``; without one, the initial seed of torch's generator."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))


def stream_seed(seed: int) -> int:
    """The seed of order and augmentation, derived from a data module's seed and that of ``seed_everything``, if given.

    Runs with different ``seed_everything`` thus have different batches, while splits depend on the module's seed alone.
    It is the same on all processes of a run.
    """
    given = os.environ.get("PL_GLOBAL_SEED")
    return seed if given is None else derive_seed(int(given), "data", seed)
