"""The report of sharpness during a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.callbacks import SharpnessReport
from lightning_kd.core.training_subset import training_samples
from lightning_kd.metrics import measure_sharpness
from tests.callbacks.test_callbacks import Method, data, trainer
from tests.two_processes import on_two_ranks


def report(**options: Any) -> SharpnessReport:
    return SharpnessReport(**{"samples": 40, "steps": 4, "max_probes": 5, **options})


class Logged(L.Callback):
    """Keeps the sharpness values that were logged, before a checkpoint would be written."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("sharpness/")]
        self.rows.append({name: float(trainer.callback_metrics[name]) for name in names})


def test_report_is_logged_and_written_and_leaves_training_unchanged(tmp_path: Path) -> None:
    weights, states, logged = [], [], Logged()
    for extra in ([], [report(every=1, slices="1d", points=3), logged]):
        torch.manual_seed(1)
        method = Method()
        trainer(tmp_path, *extra).fit(method, data())
        weights.append(method.state_dict())
        states.append(torch.get_rng_state())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(*states)
    entries = json.loads((tmp_path / "sharpness.json").read_text())
    assert [entry["epoch"] for entry in entries] == [1, 2]
    last = logged.rows[-1]
    assert last["sharpness/trace"] == pytest.approx(entries[-1]["trace"], rel=1e-6)
    assert last["sharpness/rise_0.05"] == pytest.approx(entries[-1]["epsilon_sharpness"]["0.05"], rel=1e-6)
    assert {"sharpness/loss", "sharpness/acc", "sharpness/kappa", "sharpness/nc1"} <= last.keys()
    digits = data()
    digits.setup("fit")
    loader = training_samples(digits, 40, stream="sharpness").loader
    expected = measure_sharpness(method.network, None, loader, classifier=method.network[4], steps=4, which=["head"])
    assert entries[-1]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert entries[-1]["kappa"] == pytest.approx(expected.kappa, rel=1e-5)
    assert (tmp_path / "pictures" / "loss_slice_epoch002.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(tmp_path / "pictures" / "loss_slice_epoch002.npz") as saved:
        assert saved["position"].tolist() == [-1, 0, 1]
        assert saved["loss"][1] == pytest.approx(expected.loss, rel=1e-5)


class SyncSpy(Method):
    """Keeps the ``sync_dist`` that the sharpness values were logged with."""

    def log_dict(self, dictionary: Any, **kwargs: Any) -> None:
        if "sharpness/loss" in dictionary:
            self.synced = kwargs.get("sync_dist")
        super().log_dict(dictionary, **kwargs)


class Plain(L.LightningModule):
    """A user's module with its own loss and a frozen layer, which ends the fit after its second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 4).requires_grad_(False)
        self.last = nn.Linear(4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.hidden(image).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.current_epoch == 1:
            self.trainer.should_stop = True
        return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Squared(SharpnessReport):
    def loss(self, pl_module: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(pl_module(batch.image)[:, 0], batch.target.float())


def test_report_takes_any_module_and_loss_and_an_early_end(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randn(10, 3), torch.arange(10) % 2), 4, shuffle=True)
    callback = Squared(samples=10, steps=3, max_probes=5)
    trainer(tmp_path, callback, max_epochs=5).fit(Plain(), loader)
    (entry,) = json.loads((tmp_path / "sharpness.json").read_text())
    assert entry["epoch"] == 2
    assert entry["samples"] == 10
    assert list(entry["layer_traces"]) == ["last"]
    assert entry["top_eigenvalue"] > 0
    assert entry["accuracy"] is entry["kappa"] is None


def test_failed_measurement_or_file_is_a_warning(tmp_path: Path) -> None:
    class Broken(SharpnessReport):
        def loss(self, pl_module: nn.Module, batch: Any) -> Tensor:
            return pl_module(batch.image)

    with pytest.warns(UserWarning, match="no sharpness after 1 epoch .* the training goes on"):
        trainer(tmp_path, Broken(samples=5), max_epochs=1).fit(Method(), data())
    assert not (tmp_path / "sharpness.json").exists()
    (tmp_path / "sharpness.json").mkdir()  # nothing can be written there, but all can be logged
    logged = Logged()
    with pytest.warns(UserWarning, match="no file of sharpness after 1 epoch .* the training goes on"):
        trainer(tmp_path, report(which=["head"]), logged, max_epochs=1).fit(Method(), data())
    assert logged.rows[0]["sharpness/loss"] > 0


def test_resumed_fit_adds_entries_and_a_new_fit_replaces_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every": 1, "which": ["head"]}
    first = trainer(tmp_path, report(**options), max_epochs=2)
    first.fit(Method(), data())
    first.save_checkpoint(tmp_path / "two.ckpt")
    trainer(tmp_path, report(**options), max_epochs=3).fit(Method(), data(), ckpt_path=tmp_path / "two.ckpt")
    assert [entry["epoch"] for entry in json.loads((tmp_path / "sharpness.json").read_text())] == [1, 2, 3]
    trainer(tmp_path, report(**options), max_epochs=1).fit(Method(), data())
    assert [entry["epoch"] for entry in json.loads((tmp_path / "sharpness.json").read_text())] == [1]


class Moving(WeightAveraging):
    """Sets all weights to zero at the end of the training, as weight averaging sets the average."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            for p in pl_module.parameters():
                p.zero_()


@pytest.mark.parametrize("every", [None, 1])
def test_averaged_weights_are_measured_after_they_are_set(tmp_path: Path, every: int | None) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    parts = Moving(), report(which=["head"], every=every)
    trainer(tmp_path, *parts, logger=logger).fit(Method(), data())
    entries = [e for path in tmp_path.rglob("sharpness.json") for e in json.loads(path.read_text())]
    assert [entry["epoch"] for entry in entries] == ([2] if every is None else [1, 2])
    assert entries[-1]["loss"] == pytest.approx(np.log(10), rel=1e-6)
    assert entries[-1]["weight_norm"] == 0
    assert "sharpness/loss" in next(tmp_path.rglob("metrics.csv")).read_text()
    with pytest.raises(ValueError, match=r"before Moving has set .* put it after that in callbacks"):
        trainer(tmp_path, *reversed(parts)).fit(Method(), data())


class StopWanted(L.Callback):
    """Asks to stop after each epoch, as early stopping does; before ``min_epochs`` the fit goes on."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


def test_a_fit_that_stops_early_is_measured_once(tmp_path: Path) -> None:
    trainer(tmp_path, StopWanted(), report(which=["head"]), max_epochs=5, min_epochs=3).fit(Method(), data())
    assert [entry["epoch"] for entry in json.loads((tmp_path / "sharpness.json").read_text())] == [3]


def test_entries_of_checkpoints_stay_and_a_damaged_file_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "sharpness.json"
    path.write_text('[{"checkpoint": "last.ckpt", "loss": 1}, {"epoch": 9, "loss": 2}]')
    trainer(tmp_path, report(which=["head"]), max_epochs=1).fit(Method(), data())
    kept, new = json.loads(path.read_text())
    assert kept == {"checkpoint": "last.ckpt", "loss": 1}
    assert new["epoch"] == 1
    path.write_text('[{"epo')
    with pytest.warns(UserWarning, match="is damaged .* a new one is written"):
        trainer(tmp_path, report(which=["head"]), max_epochs=1).fit(Method(), data())
    assert len(json.loads(path.read_text())) == 1
    assert (tmp_path / "sharpness.damaged.json").read_text() == '[{"epo'


class Averaged(Method):
    """A task whose main network is a frozen average."""

    def __init__(self) -> None:
        super().__init__(channels_last=True)
        self.average = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)

    @property
    def main_network(self) -> nn.Module:
        return self.average


def test_loss_slice_varies_the_main_network() -> None:
    digits, task = data(), Averaged()
    digits.setup("fit")
    found, drawn = report(slices="1d", points=3, which=["head"]).measure(task, digits)
    assert drawn.loss[1].item() == pytest.approx(found.loss, rel=1e-6)
    assert drawn.loss[0].item() != pytest.approx(found.loss, rel=1e-3)
    assert task.channels_last


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"at_end": False}, {"samples": 0}, {"which": ["x"]}, {"slices": "3d"}]
)
def test_wrong_arguments_raise(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SharpnessReport(**options)


def fit_on_a_rank(folder: str) -> None:
    torch.manual_seed(1)
    method = SyncSpy()
    trainer(folder, report(), strategy="ddp", devices=2, max_epochs=1, limit_train_batches=1).fit(method, data())
    assert method.synced is True
    torch.save(method.network.state_dict(), f"{folder}/rank{method.global_rank}.pt")


def test_report_of_two_processes_equals_that_of_one(tmp_path: Path) -> None:
    on_two_ranks(fit_on_a_rank, str(tmp_path))
    (found,) = json.loads((tmp_path / "sharpness.json").read_text())
    method, digits = Method(), data()
    method.network.load_state_dict(torch.load(tmp_path / "rank0.pt"))
    digits.setup("fit")
    loader = training_samples(digits, 40, stream="sharpness").loader
    expected = measure_sharpness(
        method.network, None, loader, classifier=method.network[4], num_classes=10, steps=4, min_probes=5, max_probes=5
    ).to_dict()
    assert found["samples"] == 40
    for name in ("loss", "top_eigenvalue", "trace", "kappa", "nc1"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_fast_dev_run_leaves_the_report_alone(tmp_path: Path) -> None:
    path = tmp_path / "sharpness.json"
    path.write_text('[{"epoch": 3, "loss": 1}]')
    trainer(tmp_path, report(which=["head"]), fast_dev_run=True).fit(Method(), data())
    assert json.loads(path.read_text()) == [{"epoch": 3, "loss": 1}]
