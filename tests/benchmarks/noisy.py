"""The benches of learning with noisy labels."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from measure import Clock, Settings, Variant, compare, now
from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.phased_loader import Phase, PhasedLoader
from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.data import ArrayDataModule
from lightning_kd.data.array_files import Arrays
from lightning_kd.noisy_labels import DPC, update_rows


class RandomImages(ArrayDataModule):
    """Random 32x32 colour images of 10 classes in memory."""

    def __init__(self, count: int, **kwargs: Any) -> None:
        self.count = count
        super().__init__("none", fake=True, val_fraction=0.0, **kwargs)

    def fake_arrays(self) -> Arrays:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (self.count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        target = torch.arange(self.count) % 10
        return Arrays(image, target, image[:10], target[:10])


class StepTimes(L.Callback):
    """The seconds of each training step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = now()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(now() - self.start)


def quiet_trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def margins(settings: Settings) -> None:
    """Scoring a training set: both networks' margins and mixtures, against the forward passes alone."""
    count = settings.size(50_000, 5_000)
    data = RandomImages(count, eval_batch_size=256)
    model = DPC("cnn", 10, head_width=32, warmup_epochs=1)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(model, datamodule=data)
    loader = data.loader("train")
    networks = list(model.networks.eval())
    memory_format = torch.channels_last if model.channels_last else torch.contiguous_format

    def forward() -> list[Tensor]:
        with torch.no_grad():
            batches = [batch.image.contiguous(memory_format=memory_format) for batch in loader]
            return [torch.cat([network(image) for image in batches]) for network in networks]

    def passes() -> float:
        with Clock() as clock:
            forward()
        return clock.seconds / count

    def one_by_one() -> float:
        target = data.train_target
        with Clock() as clock:
            for logits in forward():
                found: dict[int, float] = {}
                for i in range(count):
                    row = logits[i].clone()
                    own = row[target[i]].item()
                    row[target[i]] = -float("inf")
                    found[i] = own - row.max().item()
        return clock.seconds / count

    def ours() -> float:
        with Clock() as clock:
            model.score_training_set()
        return clock.seconds / count

    variants = [
        Variant("a Python loop over samples", one_by_one),
        Variant("the forward passes alone", passes),
        Variant("DPC: margins and both mixtures", ours, "that of the forward passes"),
    ]
    compare(f"margins: a sample of {count:,}, two networks", variants, settings.rounds, show="us")


class BareStep:
    """The forwards and the backward of a DPC step, and nothing else."""

    def __init__(self, model: DPC) -> None:
        self.networks, self.heads, self.taps = model.networks, model.heads, model._taps
        self.optimizer = torch.optim.SGD([*self.networks[0].parameters(), *self.heads[0].parameters()], 0.01, 0.9)

    def run(self, labelled: Batch, unlabelled: Batch) -> None:
        self.networks.train()
        self.networks[1].eval()
        views = [image.contiguous(memory_format=torch.channels_last) for image in (*labelled.image, *unlabelled.image)]
        with torch.no_grad():
            for view in views:
                self.networks[0](view)
            self.networks[1](torch.cat(views[2:]))
        self.optimizer.zero_grad()
        logits = self.networks[0](torch.cat(views))
        second = self.heads[0](self.taps[0].pop())
        (F.cross_entropy(logits, labelled.target.repeat(4)) + second.square().mean()).backward()
        self.optimizer.step()


def rows(settings: Settings) -> None:
    """The update of BLDR's u and v for a batch, for training sets of several sizes."""
    batch_size, classes, times = 256, 100, settings.size(200, 50)
    variants = []
    for count in (1_000, 50_000, 1_000_000):
        memory = SampleMemory((classes,))
        memory.allocate(count, torch.device("cpu"))
        batches = torch.randint(0, count, (times, batch_size), generator=torch.Generator().manual_seed(0))

        def turn(memory: SampleMemory = memory, batches: Tensor = batches) -> float:
            with Clock() as clock:
                for index in batches:
                    leaf = memory.rows[index].requires_grad_()
                    leaf.square().sum().backward()
                    assert leaf.grad is not None
                    update_rows(memory.rows, index, leaf.grad, 10.0)
            return clock.seconds / times

        variants.append(Variant(f"{count:,} samples", turn, "" if count == 1_000 else "about 1"))
    compare(f"rows: u of a batch of {batch_size}, {classes} classes", variants, settings.rounds, show="us")


def dpc(settings: Settings) -> None:
    """A semi-supervised step of DPC in a Trainer, against the sum of its forwards and its backward."""
    batch_size, steps = settings.size(64, 32), 3
    images = torch.randn(4, batch_size, 3, 32, 32)
    target, index = torch.arange(batch_size) % 10, torch.arange(batch_size)
    labelled = Batch((images[0], images[1]), target, index, {})
    unlabelled = Batch((images[2], images[3]), target, index, {})
    bare = BareStep(DPC("resnet20", 10, channels_last=True))
    model = DPC("resnet20", 10, warmup_epochs=1, ramp_epochs=0.0)

    class Repeated(list[Batch]):
        def set_epoch(self, epoch: int) -> None: ...

    model.train_loader = lambda data: PhasedLoader(  # type: ignore[method-assign]
        [Phase(0, Repeated(repeat(labelled, steps)), Repeated(repeat(unlabelled, steps)))]
    )
    model.on_train_epoch_end = lambda: None  # type: ignore[method-assign]  # no scoring of the training set
    data = RandomImages(2 * batch_size)

    def plain() -> float:
        with Clock() as clock:
            for _ in range(steps):
                bare.run(labelled, unlabelled)
        return clock.seconds / steps

    def ours() -> float:
        times = StepTimes()
        quiet_trainer(max_epochs=2, callbacks=[times]).fit(model, datamodule=data)
        return sum(times.steps[steps:]) / steps

    variants = [Variant("forwards, backward, SGD", plain), Variant("DPC in a Trainer", ours, ">= 0.91")]
    compare(f"dpc: a step of resnet20, batch {batch_size}", variants, settings.rounds)
