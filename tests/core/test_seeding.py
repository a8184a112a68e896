import random

import lightning as L
import numpy as np
import torch

from lightning_kd.core.seeding import EpochSeeding, derive_seed, numpy_generator, torch_generator


def test_seeds_differ_by_stream_epoch_pass_and_rank_and_repeat():
    seeds = {
        derive_seed(seed, stream, epoch, pass_, rank)
        for seed in range(3)
        for stream in ("shuffle", "augment")
        for epoch in range(3)
        for pass_ in range(2)
        for rank in range(2)
    }
    assert len(seeds) == 3 * 2 * 3 * 2 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    # the same on every machine and in every version, or older runs could not be resumed
    assert derive_seed(0, "shuffle") == 3356576244374652576
    assert derive_seed(1, "augment", 2, 1, 3) == 5016776883936452418
    # epoch, pass and rank are 0 by default
    assert derive_seed(0, "shuffle") == derive_seed(0, "shuffle", 0, 0, 0)
    a, b = (numpy_generator(1, "x", 2).random(4) for _ in range(2))
    assert np.array_equal(a, b)
    a, b = (torch.rand(4, generator=torch_generator(1, "x", 2)) for _ in range(2))
    assert torch.equal(a, b)


class FakeTrainer:
    current_epoch = 0
    global_rank = 0


def draws(callback, epoch, rank=0):
    trainer = FakeTrainer()
    trainer.current_epoch, trainer.global_rank = epoch, rank
    callback.on_train_epoch_start(trainer, None)
    return torch.rand(1).item(), np.random.random(), random.random()  # noqa: NPY002


def test_global_generators_depend_on_epoch_and_rank_alone():
    callback = EpochSeeding()
    callback.seed = 5
    first = draws(callback, 3)
    torch.rand(100)
    assert draws(callback, 3) == first
    assert draws(callback, 4)[0] != first[0]
    assert draws(callback, 3, rank=1)[0] != first[0]
    restored = EpochSeeding()
    restored.load_state_dict(callback.state_dict())
    assert draws(restored, 3) == first


def test_epoch_seeding_takes_the_seed_of_seed_everything(monkeypatch):
    L.seed_everything(11)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    callback = EpochSeeding()
    callback.on_train_start(trainer, None)
    assert callback.seed == 11
