"""Unlabelled samples beside a labelled data set: their positions, which are left out, and training on both."""

import logging
import os
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_kd import SSLD, Classification
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import ArrayDataModule, DigitsDataModule, ImageFolderDataModule, OpenSetDataModule
from tests.data.image_trees import damage_three_files, write_image_folders
from tests.two_processes import on_two_ranks


def noise(count, seed, shape=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def arrays(tmp_path):
    """60 labelled and 20 test images, and 34 unlabelled ones of which two are copies of each."""
    train, test = noise(60, 0), noise(20, 1)
    np.savez(
        tmp_path / "set.npz",
        train_image=train,
        train_target=np.arange(60) % 3,
        test_image=test,
        test_target=np.arange(20) % 3,
    )
    np.save(tmp_path / "more.npy", np.concatenate([noise(15, 2), train[5:7], test[3:5], noise(15, 3)]))
    return tmp_path


def data_with_unlabelled(arrays, **options):
    options = {"unlabelled": str(arrays / "more.npy"), "batch_size": 16, **options}
    return ArrayDataModule(str(arrays / "set.npz"), **options)


def test_unlabelled_samples_follow_the_labelled_without_copies(arrays, caplog):
    data, plain = data_with_unlabelled(arrays), data_with_unlabelled(arrays, unlabelled=None)
    with caplog.at_level(logging.INFO, "lightning_kd"):
        data.setup()
    assert "unlabelled: 4 of 34 samples are also in the training, validation or test data" in caplog.text
    plain.setup()
    assert data.unlabelled_indices.tolist() == list(range(60, 90))
    assert (data.train_target[60:] == -1).all()
    assert torch.equal(data.train_image[60:, 0], torch.from_numpy(np.concatenate([noise(15, 2), noise(15, 3)])))
    # everything else is as without unlabelled samples
    for name in ("train_indices", "val_indices", "test_indices", "train_image", "train_target", "test_target"):
        a, b = (getattr(one, name) for one in (data, plain))
        assert np.array_equal(a[: len(b)] if name.startswith("train_") else a, b), name
    assert (data.mean, data.std, data.class_names) == (plain.mean, plain.std, plain.class_names)
    for loader in (data.loader("train"), data.val_dataloader(), data.test_dataloader()):
        assert all((batch.target >= 0).all() for batch in loader)
    (batch,) = data.loader("train", data.unlabelled_indices)
    assert (batch.target == -1).all()
    assert len(plain.unlabelled_indices) == 0
    assert data.state_dict() != plain.state_dict()


def test_copies_of_validation_images_are_left_out(arrays):
    data = data_with_unlabelled(arrays, unlabelled=None)
    data.setup()
    held = data.train_image[torch.as_tensor(data.val_indices)][:, 0].numpy()
    np.save(arrays / "leaks.npy", np.concatenate([held, noise(1, 9)]))
    data = data_with_unlabelled(arrays, unlabelled=str(arrays / "leaks.npy"))
    data.setup()
    assert len(data.unlabelled_indices) == 1
    np.save(arrays / "leaks.npy", held)
    with pytest.raises(ValueError, match="holds only samples that the labelled data has"):
        data_with_unlabelled(arrays, unlabelled=str(arrays / "leaks.npy")).setup()


def test_invalid_unlabelled_data_and_combinations_raise(arrays):
    np.save(arrays / "larger.npy", noise(3, 0, (9, 9)))
    with pytest.raises(ValueError, match=r"must be like the labelled ones \(1, 8, 8\), got \(1, 9, 9\)"):
        data_with_unlabelled(arrays, unlabelled=str(arrays / "larger.npy")).setup()
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        data_with_unlabelled(arrays, unlabelled=str(arrays / "none.npy")).setup()
    with pytest.raises(ValueError, match="unlabelled and balance exclude each other"):
        data_with_unlabelled(arrays, balance=True)
    with pytest.raises(ValueError, match="unlabelled and meta_per_class exclude each other"):
        data_with_unlabelled(arrays, meta_per_class=1)
    with pytest.raises(ValueError, match="unlabelled='rest' finds no training sample that is left out"):
        data_with_unlabelled(arrays, unlabelled="rest").setup()
    with pytest.raises(ValueError, match="the source of a pool may have no unlabelled"):
        OpenSetDataModule(data_with_unlabelled(arrays), known_classes=2, initial_count=4)
    np.savez(arrays / "tags.npz", image=noise(20, 0), target=np.ones((20, 3), np.uint8))
    with pytest.raises(ValueError, match="unlabelled is for one class per sample"):
        ArrayDataModule(str(arrays / "tags.npz"), unlabelled="x.npy")


@pytest.mark.parametrize("fake", [False, True])
def test_rest_uses_the_left_out_samples_with_hidden_labels(fake):
    data = DigitsDataModule(train_per_class=4, unlabelled="rest", fake=fake)
    data.setup()
    count = len(data.train_target)
    assert len(data.train_indices) == 40
    assert np.array_equal(
        np.sort(np.concatenate([data.train_indices, data.unlabelled_indices, data.val_indices])), np.arange(count)
    )
    assert (data.train_target[data.unlabelled_indices] == -1).all()
    assert (data.train_target[data.val_indices] >= 0).all()
    assert (data.train_target[data.train_indices] >= 0).all()


def test_fake_unlabelled_samples_are_no_copies(arrays):
    data = data_with_unlabelled(arrays, fake=True)
    data.setup()
    assert len(data.unlabelled_indices) == 256
    assert data.train_image[256:].shape == data.train_image[:256].shape
    known = {row.numpy().tobytes() for row in (*data.train_image[:256], *data.test_image)}
    assert not any(row.numpy().tobytes() in known for row in data.train_image[256:])


# -- image folders ---------------------------------------------------------------------------------------------------


def folder_data(root, **options):
    return ImageFolderDataModule(str(root), image_size=8, batch_size=8, test_fraction=0.25, **options)


def test_copies_and_links_of_labelled_or_held_out_files_are_left_out(tmp_path, caplog):
    root, more = tmp_path / "set", tmp_path / "more"
    write_image_folders(root, count=12)
    write_image_folders(more, ("deep",), count=30)  # of which 12 have the content of labelled ones
    plain = folder_data(root)
    plain.setup()
    held = [plain.train_image[i] for i in plain.val_indices] + plain.test_image
    shutil.copy(held[0], more / "copy.png")
    os.symlink(plain.train_image[plain.train_indices[0]], more / "link.png")
    data = folder_data(root, unlabelled=str(more))
    with caplog.at_level(logging.INFO, "lightning_kd"):
        data.setup()
    content = {Path(path).read_bytes() for path in held}
    files = [data.train_image[i] for i in data.unlabelled_indices]
    assert files
    assert not [path for path in files if Path(path).read_bytes() in content]
    assert not [path for path in files if path.endswith(("copy.png", "link.png"))]
    assert len(files) == 30 - len({path for path in more.rglob("deep/*.png") if path.read_bytes() in content})
    batch = next(iter(data.loader("train", data.unlabelled_indices, batch_size=5)))
    assert batch.image.shape == (5, 3, 8, 8)
    assert (batch.target == -1).all()


def test_damaged_unlabelled_files_raise_or_are_skipped(tmp_path):
    root, more = write_image_folders(tmp_path / "set", count=12), write_image_folders(tmp_path / "more", count=40)
    damaged = damage_three_files(more)

    def fit(**options):
        data = folder_data(root, unlabelled=str(more), **options)
        task = SSLD("cnn_tiny", "cnn_tiny", 2, input_shape=(3, 8, 8), teacher_weights="random")
        trainer(max_epochs=1).fit(task, data)
        return data

    with pytest.raises(ValueError, match=r"3 of \d+ images cannot be read"):
        fit()
    data = fit(on_error="skip")
    assert not damaged & {data.train_image[i] for i in data.unlabelled_indices}


# -- training on both ------------------------------------------------------------------------------------------------


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def small_task(cls=SSLD):
    torch.manual_seed(3)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double() for _ in range(2))
    options = {"input_shape": (1, 8, 8), "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}
    return (cls(student, teacher, 10, **options) if cls is SSLD else cls(student, 10, **options)).double()


class SampleRecorder(L.Callback):
    """Records index and target of every training sample."""

    def __init__(self):
        self.index, self.target = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.index += batch.index.tolist()
        self.target += batch.target.tolist()


def digits(**options):
    return DigitsDataModule(fake=True, train_per_class=4, unlabelled="rest", batch_size=16, **options)


def test_ssld_trains_on_both_and_other_methods_on_labelled_samples():
    for cls, parts in ((SSLD, ("train", "unlabelled")), (Classification, ("train",))):
        seen, data = SampleRecorder(), digits()
        trainer(callbacks=[seen], precision=64).fit(small_task(cls), data)
        expected = np.sort(np.concatenate([getattr(data, f"{part}_indices") for part in parts]))
        assert sorted(seen.index) == expected.tolist()
        assert {index for index, target in zip(seen.index, seen.target, strict=True) if target < 0} == (
            set(data.unlabelled_indices.tolist()) if cls is SSLD else set()
        )


def test_resumes_to_the_bit(tmp_path):
    whole = small_task()
    trainer(max_epochs=3, precision=64).fit(whole, digits(augment=True))
    run = trainer(max_epochs=1, precision=64, enable_checkpointing=True, callbacks=run_callbacks(RunFolder(tmp_path)))
    run.fit(small_task(), digits(augment=True))
    again, last = small_task(), tmp_path / "checkpoints/last.ckpt"
    seen = SampleRecorder()
    more = trainer(max_epochs=3, precision=64, callbacks=[seen])
    more.fit(again, digits(augment=True), ckpt_path=last, weights_only=True)
    assert len(seen.index) == 2 * 230  # the two remaining epochs
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[key])
    other = DigitsDataModule(fake=True, train_per_class=4, batch_size=16)
    with pytest.raises(ValueError, match="the checkpoint was trained on other data"):
        trainer(max_epochs=3, precision=64).fit(small_task(), other, ckpt_path=last, weights_only=True)


def fit_small_task(batch_size, **options):
    data = DigitsDataModule(fake=True, train_per_class=4, unlabelled="rest", batch_size=batch_size)
    task, run = small_task(), trainer(max_epochs=2, precision=64, **options)
    run.fit(task, data)
    metrics = {key: float(run.callback_metrics[key]) for key in ("train/loss", "train/acc", "val/acc")}
    return {key: value.tolist() for key, value in task.student.state_dict().items()}, metrics


def fit_on_a_rank(batch_size):
    return fit_small_task(batch_size, strategy="ddp", devices=2)


def test_two_processes_equal_one_with_the_joint_batch():
    weights, metrics = fit_small_task(46)  # of 230 samples
    for other, their in on_two_ranks(fit_on_a_rank, 23):
        for key, value in weights.items():
            torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(value), rtol=1e-9, atol=1e-9)
        assert their == pytest.approx(metrics, rel=1e-6)
