"""Short fits on made-up images with several labels."""

import lightning as L
import numpy as np
import torch

from lightning_kd.core.problems import MultiLabel
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.augment import CropFlip
from lightning_kd.data.fake_data import fake_label_arrays
from lightning_kd.data.labelled_data import LabelledDataModule

SHAPE, CLASSES = (1, 8, 8), 4


class Labels(LabelledDataModule):
    """Made-up images with 4 labels, ``count`` of them for training, whose labels ``change`` may replace."""

    train_clean = None

    def __init__(self, change=None, count=64, **kwargs):
        self.change, self.count = change, count
        super().__init__(
            class_names=[f"c{k}" for k in range(CLASSES)],
            input_shape=SHAPE,
            mean=[0.5],
            std=[0.25],
            problem=MultiLabel(CLASSES),
            crop_flip=CropFlip(1, True),
            **{"batch_size": 16, "val_fraction": 0.25, **kwargs},
        )

    def load_arrays(self):
        image, target, test_image, test_target, *_ = fake_label_arrays(SHAPE, CLASSES)
        return Arrays(image[: self.count], target[: self.count], test_image[:32], test_target[:32])

    def _change_targets(self):
        if self.change is not None:
            clean = self.train_target
            self.train_target = self.change(clean)
            self.train_clean = clean


def noisy(target, rate=0.3):
    """Candidate labels: the true labels and some false ones."""
    false = np.random.default_rng(1).random(tuple(target.shape)) < rate
    return torch.maximum(target, torch.from_numpy(false).float())


def trainer_of(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def built(method, network="cnn_tiny", **options):
    L.seed_everything(0, verbose=False)
    return method(network, CLASSES, input_shape=SHAPE, channels_last=False, **options)


def fitted(method, data=None, ckpt_path=None, trainer=None, **options):
    """``(task, trainer)`` after two epochs with a small network."""
    task = built(method, **options)
    trainer = trainer or trainer_of()
    trainer.fit(task, datamodule=Labels() if data is None else data, ckpt_path=ckpt_path)
    return task, trainer


def resumes_to_the_bit(method, folder, make_data=Labels, epochs=3, **options):
    """Whether a run stopped after two epochs and resumed ends with the weights and memories of an undisturbed one."""
    whole, _ = fitted(method, make_data(), trainer=trainer_of(max_epochs=epochs), **options)
    _, trainer = fitted(method, make_data(), trainer=trainer_of(max_epochs=2), **options)
    trainer.save_checkpoint(folder / "two.ckpt")
    longer = trainer_of(max_epochs=epochs)
    again, _ = fitted(method, make_data(), folder / "two.ckpt", longer, **options)
    pairs = list(zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    for name, memory in getattr(whole, "memories", {}).items():
        pairs.append((memory.rows, again.memories[name].rows))
    return all(torch.equal(a, b) for a, b in pairs)
