"""A checkpoint can be resumed only on the data that it was trained on."""

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.core import Classification
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import ArrayDataModule, ImageFolderDataModule
from lightning_kd.data.data_digest import IMAGES, data_digest


def save_arrays(folder, order=None, corrected=()):
    rng = np.random.default_rng(0)
    image, target = rng.integers(0, 256, (60, 8, 8, 3), np.uint8), np.arange(60) % 3
    target[list(corrected)] = (target[list(corrected)] + 1) % 3
    order = np.arange(60) if order is None else order
    np.savez(folder / "data.npz", image=image[order], target=target[order])
    return ArrayDataModule(str(folder / "data.npz"), batch_size=20)


def fit(data, folder, epochs, ckpt_path=None):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=run_callbacks(RunFolder(folder)), **quiet)
    task = Classification("mlp_8", 3, input_shape=data.input_shape)
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_resume_with_reordered_or_relabelled_arrays_raises(tmp_path):
    last = RunFolder(tmp_path).last
    fit(save_arrays(tmp_path), tmp_path, 1)
    # in this order the labels are as before and the images are not
    order = np.r_[3:60, 0:3]
    for difference in ({"order": order}, {"corrected": [4]}):
        changed = save_arrays(tmp_path, **difference)
        with pytest.raises(ValueError, match=r"trained on other data than ArrayDataModule has now .* --overwrite"):
            fit(changed, tmp_path, 2, last)
    assert fit(save_arrays(tmp_path), tmp_path, 2, last).current_epoch == 2
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    other = save_arrays(tmp_path, order)
    # a test on other data is allowed
    trainer.test(Classification("mlp_8", 3, input_shape=other.input_shape), other, last, verbose=False)


def test_resume_with_a_new_file_raises_but_not_with_a_moved_folder(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(24):
        path = tmp_path / "data" / ("train", "val")[k % 4 == 3] / str(k % 2) / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)

    def data():
        return ImageFolderDataModule(str(tmp_path / "data"), image_size=8, batch_size=8, val_fraction=0.0)

    last = RunFolder(tmp_path / "run").last
    task = Classification("mlp_8", 2, input_shape=(3, 8, 8))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = run_callbacks(RunFolder(tmp_path / "run"))
    L.Trainer(max_epochs=1, callbacks=callbacks, **quiet).fit(task, datamodule=data())
    (tmp_path / "data").rename(tmp_path / "moved")  # the same data
    moved = ImageFolderDataModule(str(tmp_path / "moved"), image_size=8, batch_size=8, val_fraction=0.0)
    L.Trainer(max_epochs=2, **quiet, enable_checkpointing=False).fit(task, moved, ckpt_path=last, weights_only=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "moved/train/0/aa.png")
    more = ImageFolderDataModule(str(tmp_path / "moved"), image_size=8, batch_size=8, val_fraction=0.0)
    with pytest.raises(ValueError, match="trained on other data than ImageFolderDataModule"):
        L.Trainer(max_epochs=3, **quiet, enable_checkpointing=False).fit(task, more, ckpt_path=last, weights_only=True)


def test_digest_depends_on_order_indices_and_names_not_on_folders():
    image = torch.arange(6 * 3 * 8 * 8, dtype=torch.uint8).reshape(6, 3, 8, 8)
    target, indices = torch.tensor([0, 1, 2, 0, 1, 2]), np.arange(5)
    whole = data_digest(image, target, indices)
    assert data_digest(image.clone(), target.clone(), indices.copy()) == whole
    turned = image[[3, 1, 2, 0, 4, 5]]  # the same labels
    assert len({whole, data_digest(turned, target, indices), data_digest(image, target, indices[:4])}) == 3
    names = [f"/a/b/{k}.png" for k in range(6)]
    assert data_digest(names, target, indices) == data_digest(
        [name.replace("/a", "/c") for name in names], target, indices
    )
    assert data_digest(names, target, indices) != data_digest(names[::-1], target, indices)
    assert IMAGES >= 100_000  # all images of common data sets are read
