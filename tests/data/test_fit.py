"""Data modules under a Trainer: epochs, batches, devices, and two processes."""

import multiprocessing
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_kd.core.batch import Batch
from lightning_kd.data import DigitsDataModule, ImageFolderDataModule, ResidentLoader, StreamingLoader
from tests.two_processes import on_two_ranks


class Recorder(L.LightningModule):
    """Records epoch and sample indices of every batch."""

    def __init__(self, num_features):
        super().__init__()
        self.net = torch.nn.Linear(num_features, 10)
        self.seen = {"train": [], "val": [], "test": []}

    def step(self, batch, stage):
        assert isinstance(batch, Batch)
        assert batch.image.device == self.device
        self.seen[stage].append((self.current_epoch, batch.index.tolist()))
        loss = torch.nn.functional.cross_entropy(self.net(batch.image.flatten(1)), batch.target)
        self.log(f"{stage}/loss", loss, on_epoch=True)
        return loss

    def training_step(self, batch):
        return self.step(batch, "train")

    def validation_step(self, batch):
        self.step(batch, "val")

    def test_step(self, batch):
        self.step(batch, "test")

    def predict_step(self, batch):
        return batch.index

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 2, **options})


def expected_batches(data, epoch):
    loader = data.loader("train", shuffle=True)
    loader.set_epoch(epoch)
    return [batch.index.tolist() for batch in loader]


def test_fit_test_predict():
    data, task = DigitsDataModule(batch_size=100), Recorder(64)
    run = trainer(num_sanity_val_steps=0)
    run.fit(task, data)
    assert isinstance(run.train_dataloader, ResidentLoader)
    for epoch in (0, 1):
        assert [index for e, index in task.seen["train"] if e == epoch] == expected_batches(data, epoch)
    assert [i for e, index in task.seen["val"] if e == 0 for i in index] == data.val_indices.tolist()
    run.test(task, data, verbose=False)
    assert [i for _, index in task.seen["test"] for i in index] == list(range(359))
    assert torch.cat(run.predict(task, data)).tolist() == list(range(359))


def test_resume_starts_with_the_next_epoch(tmp_path):
    run = trainer(max_epochs=1)
    run.fit(Recorder(64), DigitsDataModule())
    run.save_checkpoint(tmp_path / "one.ckpt")
    data, task = DigitsDataModule(), Recorder(64)
    trainer(max_epochs=2).fit(task, data, ckpt_path=tmp_path / "one.ckpt")
    assert {epoch for epoch, _ in task.seen["train"]} == {1}
    assert [index for _, index in task.seen["train"]] == expected_batches(data, 1)


def test_resume_with_workers_gives_the_expected_batches(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(8):
            image = np.full((8, 8, 3), 9 * i, np.uint8)
            Image.fromarray(image).save(tmp_path / "set" / name / f"{i}.png")
    options = {"root": str(tmp_path / "set"), "image_size": 8, "batch_size": 4, "num_workers": 1}
    run = trainer(max_epochs=1)
    run.fit(Recorder(192), ImageFolderDataModule(**options))
    run.save_checkpoint(tmp_path / "one.ckpt")
    data, task = ImageFolderDataModule(**options), Recorder(192)
    run = trainer(max_epochs=3)
    run.fit(task, data, ckpt_path=tmp_path / "one.ckpt")
    assert isinstance(run.train_dataloader, StreamingLoader)
    assert run.train_dataloader._iterator is None  # the workers are stopped
    for epoch in (1, 2):
        assert [index for e, index in task.seen["train"] if e == epoch] == expected_batches(data, epoch)


def test_val_fraction_0_trains_without_validation():
    task = Recorder(64)
    trainer().fit(task, DigitsDataModule(val_fraction=0, train_per_class=3))
    assert task.seen["train"]
    assert not task.seen["val"]


def test_overfit_batches_repeats_the_same_batches():
    data, task = DigitsDataModule(batch_size=20), Recorder(64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(overfit_batches=2).fit(task, data)
    first, second = ([index for e, index in task.seen["train"] if e == epoch] for epoch in (0, 1))
    assert len(first) == 2
    assert first == second


def _indices_of_a_rank(folder):
    """Fits, tests and predicts on one of two processes; returns the sample indices of all batches."""
    multiprocessing.set_start_method("fork", force=True)  # loader workers start faster than spawned ones
    seen = {}
    for name, data, size in (
        ("digits", DigitsDataModule(batch_size=50, eval_batch_size=50), 64),
        ("folder", ImageFolderDataModule(folder, image_size=8, batch_size=3, num_workers=1), 192),
    ):
        task = Recorder(size)
        run = trainer(devices=2, strategy="ddp", num_sanity_val_steps=0)
        run.fit(task, data)
        run.test(task, data, verbose=False)
        seen[name] = task.seen, torch.cat(run.predict(task, data)).tolist()
        # Lightning has not replaced the loaders
        assert isinstance(run.predict_dataloaders, ResidentLoader | StreamingLoader)
    return seen


def test_two_processes_share_the_joint_batches(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(11):
            Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    folder = str(tmp_path / "set")
    ranks = on_two_ranks(_indices_of_a_rank, folder)
    modules = {
        "digits": DigitsDataModule(batch_size=100),
        "folder": ImageFolderDataModule(folder, image_size=8, batch_size=6),
    }
    for name, data in modules.items():
        parts = [seen[name][0] for seen in ranks]
        for epoch in (0, 1):
            joint = expected_batches(data, epoch)
            both = zip(*[[index for e, index in part["train"] if e == epoch] for part in parts], strict=True)
            got = [first + second for first, second in both]
            assert [g[: len(j)] for g, j in zip(got, joint, strict=True)] == joint
        for stage, size in (("val", 2 * data.val_size), ("test", data.test_size)):
            assert len(parts[0][stage]) == len(parts[1][stage])
            index = [i for part in parts for _, batch in part[stage] for i in batch]
            assert len(index) == size  # 2 epochs of validation
            assert len(set(index)) == size // (2 if stage == "val" else 1)
        assert sorted(ranks[0][name][1] + ranks[1][name][1]) == list(range(data.test_size))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_made_on_the_device():
    task, data = Recorder(64), DigitsDataModule(augment=True, cutout=2)
    run = trainer(accelerator="gpu", devices=1, max_epochs=1)
    run.fit(task, data)
    on_device = next(iter(run.train_dataloader))
    assert on_device.image.is_cuda
    assert on_device.index.is_cuda
