"""The benches: each measures the collection against plain code and prints a table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from flatness import curvature, sam, shift
from labels import relations
from lightning.pytorch.callbacks import RichProgressBar
from measure import Clock, Settings, Variant, compare, now
from noisy import dpc, margins, rows
from plain import DualHeadLoop, PictureDataset, train_classifier
from pool import badge, books, k_center, lewis, posterior, score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from weak import mogd

from lightning_kd.core.batch import Batch
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.run_logger import RunLogger
from lightning_kd.core.supervised import Classification
from lightning_kd.data import CIFAR100DataModule
from lightning_kd.data.augment import CropFlip, Normalize
from lightning_kd.data.resident import ResidentLoader
from lightning_kd.data.sampling import ShardedSampler
from lightning_kd.distillation import DHKD, teach_store
from lightning_kd.nets import build_network

CPU = torch.device("cpu")
MEAN, STD = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]
PAIRS = (("resnet32x4", "resnet8x4"), ("wrn_40_2", "wrn_16_2"))


def sgd(parameters: Any) -> torch.optim.SGD:
    """The optimizer of every bench."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


# -- data ----------------------------------------------------------------------------------------------------------


def data(settings: Settings, device: torch.device = CPU) -> None:
    """Images a second: crop, flip and normalise 32x32 images, without training; then two views of each."""
    count = settings.size(50_000, 10_000)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 100, count)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pictures = PictureDataset(pixels, labels.tolist(), transform)
    stored = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def one_by_one(batch_size: int) -> float:
        loader = DataLoader(pictures, batch_size, shuffle=True)
        seen = 0
        with Clock() as clock:
            for image, target in islice(loader, settings.size(2_560, 1_280) // batch_size):
                image, target = image.to(device), target.to(device)
                seen += len(target)
        return clock.seconds / seen

    def resident(loader: ResidentLoader) -> float:
        with Clock() as clock:
            seen = sum(len(batch.target) for batch in loader)
        return clock.seconds / seen

    for batch_size in (64, 128):
        loader = ResidentLoader(
            stored,
            torch.from_numpy(labels),
            ShardedSampler(np.arange(count), batch_size, shuffle=True),
            Normalize(MEAN, STD, (3, 32, 32)),
            augment=CropFlip(padding=4),
            device=device,
        )
        variants = [
            Variant("PIL images and transforms, 0 workers", lambda size=batch_size: one_by_one(size)),
            Variant("ResidentLoader", lambda loader=loader: resident(loader), ">= 20"),
        ]
        compare(f"data: images, batch {batch_size}", variants, settings.rounds, show="1/s")

    weak = transform.transforms
    strong = [*weak[:2], transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10), *weak[2:]]
    strong.append(transforms.RandomErasing(1.0, (0.25, 0.25), (1.0, 1.0)))  # takes about as long as a cutout
    aims = {("weak", "weak"): ">= 20", ("weak", "strong"): ">= 10"}
    for views, aim in aims.items():
        steps = [transforms.Compose(strong if view == "strong" else weak) for view in views]
        pictures.transform = lambda picture, steps=steps: torch.stack([step(picture) for step in steps])
        loader = ResidentLoader(
            stored,
            torch.from_numpy(labels),
            ShardedSampler(np.arange(settings.size(50_000, 5_000)), 128, shuffle=True),
            Normalize(MEAN, STD, (3, 32, 32)),
            augment=CropFlip(padding=4),
            device=device,
            views=views,
        )
        variants = [
            Variant("PIL images and transforms, 0 workers", lambda: one_by_one(128)),
            Variant("ResidentLoader", lambda loader=loader: resident(loader), aim),
        ]
        compare(f"data: {' + '.join(views)}, batch 128", variants, settings.rounds, show="1/s")


# -- trainer -------------------------------------------------------------------------------------------------------


class PlainModule(L.LightningModule):
    """A minimal module, which logs nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch.image), batch.target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def bare_trainer(device: torch.device = CPU, **kwargs: Any) -> L.Trainer:
    """A Trainer of one epoch, without logger, checkpoints, bar and summary."""
    nothing: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    accelerator = "gpu" if device.type == "cuda" else device.type
    return L.Trainer(accelerator=accelerator, devices=1, max_epochs=1, **{**nothing, **kwargs})


def fit_as_command(model: Classification, loader: Any, device: torch.device = CPU) -> None:
    """Fit with what the command line adds by default: a rich bar, ``metrics.csv``, two checkpoints, a summary."""
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        terminal = {"file": nowhere, "force_terminal": True, "width": 120}
        trainer = bare_trainer(
            device,
            logger=RunLogger(folder),
            callbacks=[RichProgressBar(refresh_rate=4, console_kwargs=terminal), *run_callbacks(RunFolder(folder))],
            enable_checkpointing=True,
            enable_progress_bar=True,
            default_root_dir=folder,
        )
        trainer.fit(model, loader)


def trainer(settings: Settings) -> None:
    """Time of a whole fit of a tiny network, against a bare loop over the same loader."""
    steps, batch_size, features = settings.size(1_500, 1_000), 64, 32
    loader = ResidentLoader(
        torch.randn(steps * batch_size, features),
        torch.randint(0, 10, (steps * batch_size,)),
        ShardedSampler(np.arange(steps * batch_size), batch_size, shuffle=True),
        Normalize([0.0] * features, [1.0] * features, (features,), full_scale=1.0),
    )
    name = "mlp_32"
    bare = build_network(name, 10, features)
    optimizer = sgd(bare.parameters())
    plain = PlainModule(build_network(name, 10, features))
    off, command = (Classification(name, 10, input_shape=(features,), optimizer=sgd) for _ in range(2))

    def timed(work: Any) -> float:
        with Clock() as clock:
            work()
        return clock.seconds / steps

    variants = [
        Variant("bare loop", lambda: timed(lambda: train_classifier(bare, optimizer, loader))),
        Variant("Trainer, a module that logs nothing", lambda: timed(lambda: bare_trainer().fit(plain, loader))),
        Variant("Classification, all else off", lambda: timed(lambda: bare_trainer().fit(off, loader)), "<= 1.5"),
        Variant("Classification, as the command line", lambda: timed(lambda: fit_as_command(command, loader))),
    ]
    compare(f"trainer: a step, {steps} a fit", variants, settings.rounds, show="us", extra=True)


# -- step and align ------------------------------------------------------------------------------------------------


class Batches:
    """A loader of batches that are made before."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class EpochTime(L.Callback):
    """The seconds from the first batch of an epoch to its end, without what a fit does before and after."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = now()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = now() - self.start


def random_batches(count: int, batch_size: int, device: torch.device = CPU) -> Batches:
    """Random 32x32 images of 100 classes."""
    return Batches(
        [
            Batch(
                torch.randn(batch_size, 3, 32, 32, device=device),
                torch.randint(0, 100, (batch_size,), device=device),
                torch.arange(batch_size, device=device),
            )
            for _ in range(count)
        ]
    )


def module_seconds(model: L.LightningModule, batches: Any, device: torch.device = CPU, **kwargs: Any) -> float:
    """Seconds a step of a module in a Trainer's epoch, on batches or a data module."""
    timer = EpochTime()
    bare_trainer(device, callbacks=[timer], **kwargs).fit(model, batches)
    return timer.seconds / (len(batches) if isinstance(batches, Batches) else len(batches.train_dataloader()))


def loop_seconds(loop: DualHeadLoop, batches: Batches) -> float:
    """Seconds a step of a plain loop."""
    with Clock() as clock:
        loop.run(batches)
    return clock.seconds / len(batches)


def dual_heads(student: str, teacher: str, **kwargs: Any) -> DHKD:
    return DHKD(student, teacher, 100, teacher_weights="random", optimizer=sgd, **kwargs)


def step(settings: Settings) -> None:
    """A training step of dual-head distillation without gradient alignment."""
    _steps(settings, align=False, target=">= 1.1")


def align(settings: Settings) -> None:
    """A training step of dual-head distillation with gradient alignment."""
    _steps(settings, align=True, target=">= 1.1")


def _steps(settings: Settings, align: bool, target: str) -> None:
    batch_size = settings.size(64, 32)
    batches = random_batches(1, batch_size)
    for teacher, student in PAIRS:
        loop = DualHeadLoop(student, teacher, 100, CPU, align)
        model = dual_heads(student, teacher, gradient_alignment="all" if align else "off")
        variants = [
            Variant("plain loop", lambda loop=loop: loop_seconds(loop, batches)),
            Variant("DHKD in a Trainer", lambda model=model: module_seconds(model, batches), target),
        ]
        name = "align" if align else "step"
        compare(f"{name}: {teacher} -> {student}, batch {batch_size}", variants, settings.rounds)


# -- store ---------------------------------------------------------------------------------------------------------


def store(settings: Settings) -> None:
    """A training step with stored outputs of the teacher, and how long storing them takes."""
    batch_size = settings.size(64, 32)
    for (teacher, student), target in zip(PAIRS, (">= 2.8", ">= 1.9"), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "teacher.store"
            data = CIFAR100DataModule(folder, fake=True, batch_size=batch_size, val_fraction=0.0)
            data.setup()
            data.train_indices = data.train_indices[: 2 * batch_size]
            loop = DualHeadLoop(student, teacher, 100, CPU)
            live = dual_heads(student, teacher)
            live.trainer = bare_trainer()
            teach_store(live, data, path, views="2")
            read = dual_heads(student, teacher, teacher_store=str(path))
            batches = Batches(list(data.loader("train", shuffle=True, augment=True)))

            def fill(live: DHKD = live, data: Any = data, path: Path = path, batches: Batches = batches) -> float:
                live.trainer = bare_trainer()
                with Clock() as clock:
                    teach_store(live, data, path, views="1", batch_size=64, restart=True)
                return clock.seconds / len(batches)

            variants = [
                Variant("plain loop", lambda loop=loop, batches=batches: loop_seconds(loop, batches)),
                Variant("DHKD with its teacher", lambda live=live, data=data: module_seconds(live, data)),
                Variant("DHKD with a store", lambda read=read, data=data: module_seconds(read, data), target),
            ]
            compare(f"store: {teacher} -> {student}, batch {batch_size}", variants, settings.rounds)
            views = CropFlip().views
            variants = [
                Variant("DHKD with its teacher", variants[1].turn),
                Variant(f"storing one of {views} views of each image", fill),
            ]
            compare(f"store: time to fill, {teacher}, against an epoch (a batch of each)", variants, settings.rounds)


# -- cuda ----------------------------------------------------------------------------------------------------------


def cuda(settings: Settings) -> None:
    """Data, fit and steps on a GPU that holds the data, also in bfloat16 and compiled."""
    if not torch.cuda.is_available():
        print("cuda: skipped, torch sees no CUDA device\n", flush=True)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    data(settings, device)
    gpu_fit(settings, device)
    gpu_steps(settings, device)


def gpu_fit(settings: Settings, device: torch.device, name: str = "wrn_16_2", batch_size: int = 256) -> None:
    """A whole fit as the command line does it, against a bare loop, both in float32 and channels_last."""
    batches = random_batches(settings.size(200, 50), batch_size, device)
    network = build_network(name, 100).to(device, memory_format=torch.channels_last)
    optimizer = sgd(network.parameters())
    model = Classification(name, 100, optimizer=sgd)

    def bare() -> float:
        with Clock() as clock:
            train_classifier(network, optimizer, batches)
        return clock.seconds / len(batches)

    def fit() -> float:
        with Clock() as clock:
            fit_as_command(model, batches, device)
        return clock.seconds / len(batches)

    variants = [Variant("bare loop", bare), Variant("Classification, as the command line", fit, ">= 0.87")]
    compare(f"trainer: a step of {name}, batch {batch_size}", variants, settings.rounds)


def gpu_steps(settings: Settings, device: torch.device, pairs: Sequence[tuple[str, str]] = PAIRS) -> None:
    """Distillation steps in float32, in bfloat16 and compiled, without and with gradient alignment."""
    batches = random_batches(settings.size(100, 30), 64, device)
    for teacher, student in pairs:
        for align in (False, True):
            loop = DualHeadLoop(student, teacher, 100, device, align)
            variants = [Variant("plain loop, float32", lambda loop=loop: loop_seconds(loop, batches))]
            for label, precision, compiled, target in (
                ("DHKD", "32-true", False, ">= 1"),
                ("DHKD, bf16-mixed", "bf16-mixed", False, ">= 1.5"),
                ("DHKD, bf16-mixed, compiled", "bf16-mixed", True, ">= 1.5"),
            ):
                model = dual_heads(student, teacher, gradient_alignment="all" if align else "off", compile=compiled)
                variants.append(
                    Variant(
                        label,
                        lambda model=model, precision=precision: module_seconds(
                            model, batches, device, precision=precision
                        ),
                        target,
                    )
                )
            title = f"{'align' if align else 'step'}: {teacher} -> {student}, batch 64"
            compare(title, variants, settings.rounds)


BENCHES = {
    "data": data,
    "trainer": trainer,
    "step": step,
    "align": align,
    "store": store,
    "margins": margins,
    "dpc": dpc,
    "rows": rows,
    "relations": relations,
    "mogd": mogd,
    "k_center": k_center,
    "badge": badge,
    "lewis": lewis,
    "posterior": posterior,
    "score": score,
    "books": books,
    "shift": shift,
    "sam": sam,
    "curvature": curvature,
    "cuda": cuda,
}
