"""Random streams that are derived, never continued, so that a resumed run draws what the undisturbed one drew."""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import lightning as L
import numpy as np
import torch


def derive_seed(seed: int, stream: str, epoch: int = 0, pass_: int = 0, rank: int = 0) -> int:
    """One 63-bit seed for the stream ``(seed, stream name, epoch, pass, rank)``.

    Different tuples give independent streams (``numpy.random.SeedSequence``); the same tuple gives the same seed on
    every machine and in every process.
    """
    entropy = [seed, zlib.crc32(stream.encode()), epoch, pass_, rank]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def numpy_generator(seed: int, stream: str, epoch: int = 0, pass_: int = 0, rank: int = 0) -> np.random.Generator:
    """A NumPy generator of the stream ``(seed, stream name, epoch, pass, rank)``."""
    return np.random.default_rng(derive_seed(seed, stream, epoch, pass_, rank))


def torch_generator(
    seed: int, stream: str, epoch: int = 0, pass_: int = 0, rank: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A torch generator on ``device`` of the stream ``(seed, stream name, epoch, pass, rank)``."""
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, epoch, pass_, rank))


class EpochSeeding(L.Callback):
    """Reseed the global generators of torch, NumPy and Python at the start of each training epoch.

    Dropout and whatever else draws from a global generator then depends on (seed, epoch, rank) alone, and a run
    resumed at the end of an epoch goes on as if it had never stopped. Every task adds this callback itself. The seed
    is the one of ``seed_everything``; without one, it is drawn once, shared by all processes and kept in checkpoints.
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
    """The seed given to ``seed_everything``, or else the state of torch's generator as it is now."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))


def stream_seed(seed: int) -> int:
    """The seed of a data module's order and augmentation: its own, and that of ``seed_everything`` where there is one.

    Runs that differ in ``seed_everything`` then see other batches, while splits depend on the module's seed alone. All
    processes of a run get the same.
    """
    given = os.environ.get("PL_GLOBAL_SEED")
    return seed if given is None else derive_seed(int(given), "data", seed)
