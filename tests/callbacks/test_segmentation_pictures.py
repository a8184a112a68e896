"""Segmentation pictures: their columns, for which tasks and data, and that a failure ends no training."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_kd.callbacks import SegmentationPictures
from lightning_kd.callbacks.segmentation_pictures import pixel_figure
from lightning_kd.core import SemanticSegmentation
from lightning_kd.distillation import RDD
from tests.segmentation.runs import CLASSES, SHAPE, Pixels, task_of, trainer_of


def drawn(monkeypatch, tmp_path, task, **options):
    """The images, columns and title of each picture of a fit, and its data."""
    found = []

    def keep(image, columns, num_classes, title):
        found.append((image, columns, title))
        return pixel_figure(image, columns, num_classes, title)

    monkeypatch.setattr("lightning_kd.callbacks.segmentation_pictures.pixel_figure", keep)
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[SegmentationPictures(**options)])
    data = Pixels(eval_batch_size=3)
    trainer.fit(task, datamodule=data)
    return found, data


def test_rdd_pictures_have_four_columns_of_validation_images(monkeypatch, tmp_path):
    found, data = drawn(monkeypatch, tmp_path, task_of(RDD), count=4, every=1)
    assert [title for _, _, title in found] == [
        f"RDD after {text} (val set)" for text in ("1 epoch", "2 epochs", "2 epochs")
    ]
    image, columns, _ = found[-1]
    assert [*columns] == ["true classes", "predicted classes", "difficulty weight", "disputed pixels"]
    assert all([one.shape for one in values] == [SHAPE[1:]] * 4 for values in columns.values())
    chosen = torch.from_numpy(data.val_indices[[0, 4, 7, 11]])
    assert torch.equal(torch.stack(columns["true classes"]), data.train_target[chosen].long())
    stored = data.train_image[chosen].permute(0, 2, 3, 1).numpy() / 255
    assert np.abs(np.stack(image) - stored).max() < 1e-6
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "pixels.png",
        "pixels_epoch001.png",
        "pixels_epoch002.png",
    ]
    assert min(Image.open(tmp_path / "pictures/pixels.png").size) > 300


def test_pictures_of_a_plain_task_have_two_columns(monkeypatch, tmp_path):
    task = SemanticSegmentation("fcn_tiny", CLASSES, input_shape=SHAPE)
    found, _ = drawn(monkeypatch, tmp_path, task, count=2, split="test")
    assert [*found[0][1]] == ["true classes", "predicted classes"]
    assert task.training


SIZES = [(16, 16), (16, 24), (20, 16)]


class OtherData(L.LightningDataModule):
    """A plain data module: images of three sizes, one a batch."""

    def batches(self):
        pairs = [(torch.rand(1, 3, *size), torch.zeros(1, *size, dtype=torch.int64)) for size in SIZES]
        return DataLoader(pairs, batch_size=None)

    def train_dataloader(self):
        return self.batches()

    def val_dataloader(self):
        return self.batches()


@pytest.mark.parametrize("module", [True, False])
def test_images_of_several_sizes_from_plain_data_are_drawn(monkeypatch, tmp_path, module):
    found = []
    monkeypatch.setattr(
        "lightning_kd.callbacks.segmentation_pictures.pixel_figure",
        lambda *args: found.append(args) or pixel_figure(*args),
    )
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[SegmentationPictures(count=2)], max_epochs=1)
    data = OtherData()
    given = {"datamodule": data} if module else {"train_dataloaders": data.batches(), "val_dataloaders": data.batches()}
    trainer.fit(task_of(RDD), **given)
    image, columns, *_ = found[0]
    assert [one.shape[:2] for one in image] == SIZES[:2]
    assert len(columns) == 4
    assert all([tuple(one.shape) for one in values] == SIZES[:2] for values in columns.values())
    assert (tmp_path / "pictures" / "pixels.png").is_file()


def test_failed_picture_is_a_warning(tmp_path):
    class Broken(SemanticSegmentation):
        def pixel_maps(self, image, target):
            raise RuntimeError("no map")

    task = Broken("fcn_tiny", CLASSES, input_shape=SHAPE)
    with pytest.warns(UserWarning, match=r"^no picture of pixels after 2 epochs \(RuntimeError: no map\)"):
        trainer_of(default_root_dir=tmp_path, callbacks=[SegmentationPictures()]).fit(task, datamodule=Pixels())


def test_classes_have_their_colours_and_ignored_pixels_are_white():
    columns = {"true classes": torch.tensor([[[0, 1], [-1, 2]]])}
    figure = pixel_figure(np.zeros((1, 2, 2, 3)), columns, 3, "t")
    shown = figure.axes[1].images[0].get_array()
    assert shown.tolist() == [[[0, 0, 0], [128, 0, 0]], [[255, 255, 255], [0, 128, 0]]]
    with pytest.raises(ValueError, match=r"^split must be 'val' or 'test', got 'train'"):
        SegmentationPictures(split="train")
