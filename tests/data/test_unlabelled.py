"""Samples without labels beside a labelled set: where they stand, what is left out, and a training on both."""

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
from tests.data.image_trees import folders, spoil
from tests.two_processes import on_two_ranks


def noise(count, seed, shape=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def arrays(tmp_path):
    """60 labelled and 20 test images, and 30 others among which are two of each."""
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


def beside(arrays, **options):
    options = {"unlabelled": str(arrays / "more.npy"), "batch_size": 16, **options}
    return ArrayDataModule(str(arrays / "set.npz"), **options)


def test_they_stand_behind_the_labelled_ones(arrays, caplog):
    data, plain = beside(arrays), beside(arrays, unlabelled=None)
    with caplog.at_level(logging.INFO, "lightning_kd"):
        data.setup()
    assert "unlabelled: 4 of 34 samples are also in the training, validation or test data" in caplog.text
    plain.setup()
    assert data.unlabelled_indices.tolist() == list(range(60, 90))
    assert (data.train_target[60:] == -1).all()
    assert torch.equal(data.train_image[60:, 0], torch.from_numpy(np.concatenate([noise(15, 2), noise(15, 3)])))
    # all else is as without
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


def test_a_copy_of_a_validation_image_is_left_out(arrays):
    data = beside(arrays, unlabelled=None)
    data.setup()
    held = data.train_image[torch.as_tensor(data.val_indices)][:, 0].numpy()
    np.save(arrays / "leaks.npy", np.concatenate([held, noise(1, 9)]))
    data = beside(arrays, unlabelled=str(arrays / "leaks.npy"))
    data.setup()
    assert len(data.unlabelled_indices) == 1
    np.save(arrays / "leaks.npy", held)
    with pytest.raises(ValueError, match="holds only samples that the labelled data has"):
        beside(arrays, unlabelled=str(arrays / "leaks.npy")).setup()


def test_what_is_refused(arrays):
    np.save(arrays / "larger.npy", noise(3, 0, (9, 9)))
    with pytest.raises(ValueError, match=r"must be like the labelled ones \(1, 8, 8\), got \(1, 9, 9\)"):
        beside(arrays, unlabelled=str(arrays / "larger.npy")).setup()
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        beside(arrays, unlabelled=str(arrays / "none.npy")).setup()
    with pytest.raises(ValueError, match="unlabelled and balance exclude each other"):
        beside(arrays, balance=True)
    with pytest.raises(ValueError, match="unlabelled and meta_per_class exclude each other"):
        beside(arrays, meta_per_class=1)
    with pytest.raises(ValueError, match="unlabelled='rest' finds no training sample that is left out"):
        beside(arrays, unlabelled="rest").setup()
    with pytest.raises(ValueError, match="the source of a pool may have no unlabelled"):
        OpenSetDataModule(beside(arrays), known_classes=2, initial_count=4)
    np.savez(arrays / "tags.npz", image=noise(20, 0), target=np.ones((20, 3), np.uint8))
    with pytest.raises(ValueError, match="unlabelled is for one class per sample"):
        ArrayDataModule(str(arrays / "tags.npz"), unlabelled="x.npy")


@pytest.mark.parametrize("fake", [False, True])
def test_the_rest_with_their_labels_hidden(fake):
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


def test_made_up_ones(arrays):
    data = beside(arrays, fake=True)
    data.setup()
    assert len(data.unlabelled_indices) == 256
    assert data.train_image[256:].shape == data.train_image[:256].shape
    known = {row.numpy().tobytes() for row in (*data.train_image[:256], *data.test_image)}
    assert not any(row.numpy().tobytes() in known for row in data.train_image[256:])


# -- image folders ---------------------------------------------------------------------------------------------------


def streamed(root, **options):
    return ImageFolderDataModule(str(root), image_size=8, batch_size=8, test_fraction=0.25, **options)


def test_files_that_are_labelled_or_held_out_are_left_out(tmp_path, caplog):
    root, more = tmp_path / "set", tmp_path / "more"
    folders(root, count=12)
    folders(more, ("deep",), count=30)  # of which 12 have the content of labelled ones
    plain = streamed(root)
    plain.setup()
    held = [plain.train_image[i] for i in plain.val_indices] + plain.test_image
    shutil.copy(held[0], more / "copy.png")
    os.symlink(plain.train_image[plain.train_indices[0]], more / "link.png")
    data = streamed(root, unlabelled=str(more))
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


def test_damaged_files_are_told_or_skipped(tmp_path):
    root, more = folders(tmp_path / "set", count=12), folders(tmp_path / "more", count=40)
    damaged = spoil(more)

    def fit(**options):
        data = streamed(root, unlabelled=str(more), **options)
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


class Seen(L.Callback):
    """The samples of each epoch, and their targets."""

    def __init__(self):
        self.index, self.target = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.index += batch.index.tolist()
        self.target += batch.target.tolist()


def digits(**options):
    return DigitsDataModule(fake=True, train_per_class=4, unlabelled="rest", batch_size=16, **options)


def test_an_epoch_goes_over_both_and_other_methods_over_the_labelled():
    for cls, parts in ((SSLD, ("train", "unlabelled")), (Classification, ("train",))):
        seen, data = Seen(), digits()
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
    seen = Seen()
    more = trainer(max_epochs=3, precision=64, callbacks=[seen])
    more.fit(again, digits(augment=True), ckpt_path=last, weights_only=True)
    assert len(seen.index) == 2 * 230  # of both epochs that were left
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[key])
    other = DigitsDataModule(fake=True, train_per_class=4, batch_size=16)
    with pytest.raises(ValueError, match="the checkpoint was trained on other data"):
        trainer(max_epochs=3, precision=64).fit(small_task(), other, ckpt_path=last, weights_only=True)


def fit_one(batch_size, **options):
    data = DigitsDataModule(fake=True, train_per_class=4, unlabelled="rest", batch_size=batch_size)
    task, run = small_task(), trainer(max_epochs=2, precision=64, **options)
    run.fit(task, data)
    metrics = {key: float(run.callback_metrics[key]) for key in ("train/loss", "train/acc", "val/acc")}
    return {key: value.tolist() for key, value in task.student.state_dict().items()}, metrics


def fit_two(batch_size):
    return fit_one(batch_size, strategy="ddp", devices=2)


def test_two_processes_equal_one_with_the_joint_batch():
    weights, metrics = fit_one(46)  # of 230 samples
    for other, their in on_two_ranks(fit_two, 23):
        for key, value in weights.items():
            torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(value), rtol=1e-9, atol=1e-9)
        assert their == pytest.approx(metrics, rel=1e-6)
