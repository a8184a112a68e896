"""Short fits on made-up images with a class for each pixel."""

import lightning as L
import torch
from torch import nn

from lightning_kd.core.problems import Segmentation
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.augment import CropFlip
from lightning_kd.data.fake_data import fake_mask_arrays
from lightning_kd.data.labelled_data import LabelledDataModule

SHAPE, CLASSES = (3, 16, 16), 4


class Pixels(LabelledDataModule):
    """48 made-up training images with masks, in batches of 8."""

    def __init__(self, **kwargs):
        super().__init__(
            class_names=[f"c{k}" for k in range(CLASSES)],
            input_shape=SHAPE,
            mean=[0.5] * 3,
            std=[0.25] * 3,
            problem=Segmentation(CLASSES),
            crop_flip=CropFlip(2, True),
            **{"batch_size": 8, "val_fraction": 0.25, **kwargs},
        )

    def load_arrays(self):
        image, target, test_image, test_target, *_ = fake_mask_arrays(SHAPE, CLASSES)
        return Arrays(image[:48], target[:48], test_image[:16], test_target[:16])


class TwoHeads(nn.Module):
    """Logits at a quarter of the size, as the papers' networks give them: ``(main, auxiliary)``, or only the main."""

    def __init__(self, auxiliary=True, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.ReLU())
        self.main = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, CLASSES, 1))
        self.auxiliary = nn.Conv2d(width, CLASSES, 1) if auxiliary else None

    def forward(self, image):
        feature = self.stem(image)
        return (self.main(feature), self.auxiliary(feature)) if self.auxiliary is not None else self.main(feature)


def trainer_of(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def task_of(method, student=None, teacher=None, **options):
    """A task whose student and teacher are drawn from seed 0."""
    L.seed_everything(0, verbose=False)
    teacher = TwoHeads(width=12) if teacher is None else teacher
    student = TwoHeads() if student is None else student
    return method(student, teacher, CLASSES, input_shape=SHAPE, channels_last=False, **options)


def plain_batch(count=4, seed=0):
    """``(image, target)``: normalised images and int64 masks."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, *SHAPE, generator=generator)
    target = torch.randint(-1, CLASSES, (count, *SHAPE[1:]), generator=generator)
    return image, target
