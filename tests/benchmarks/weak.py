"""The benches of learning from weak labels."""

from __future__ import annotations

from measure import Settings, Variant, compare
from noisy import RandomImages, StepTimes, quiet_trainer

from lightning_kd.core.supervised import Classification
from lightning_kd.data import UniformCandidates
from lightning_kd.weak_labels import MoGD


def mogd(settings: Settings) -> None:
    """A training step of MoGD with 64 meta samples, against one of plain training."""
    batch_size, steps = settings.size(256, 128), settings.size(8, 4)
    data = RandomImages(
        steps * batch_size + 100, batch_size=batch_size, candidates=UniformCandidates(0.3), meta_per_class=10
    )

    def turn(task: Classification | MoGD) -> float:
        times = StepTimes()
        quiet_trainer(max_epochs=1, callbacks=[times]).fit(task, datamodule=data)
        return sum(times.steps) / len(times.steps)

    for name in ("cnn", "resnet20"):
        tasks = {
            "Classification": (Classification(name, 10), ""),
            "MoGD": (MoGD(name, 10), ">= 0.29"),
            'MoGD, init "zero"': (MoGD(name, 10, init="zero"), ">= 0.29"),
            'MoGD, meta_layer "head"': (MoGD(name, 10, meta_layer="head"), ""),
        }
        variants = [Variant(title, lambda task=task: turn(task), aim) for title, (task, aim) in tasks.items()]
        compare(f"mogd: a step of {name}, batch {batch_size}", variants, settings.rounds)
