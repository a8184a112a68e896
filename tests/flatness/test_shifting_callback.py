"""The callback OptimumShifting, and OptimumShiftingClassifier, the task that adds it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.core import Classification
from lightning_kd.core.averaging import averaged_copy, update_average
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.run_logger import RunLogger
from lightning_kd.data import DigitsDataModule
from lightning_kd.flatness import OptimumShifting, OptimumShiftingClassifier, shift_samples
from tests.two_processes import on_two_ranks

SGD = {"lr": 0.05, "momentum": 0.9}


def network() -> nn.Module:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.1))
    return nn.Sequential(body, nn.Linear(48, 10))


def task(**options: Any) -> Classification:
    made = Classification(
        network(), 10, input_shape=(1, 8, 8), optimizer=lambda p: torch.optim.SGD(p, **SGD), **options
    )
    return made


def data(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(fake=True, batch_size=64, **options)


def trainer(*extra: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {**quiet, "enable_checkpointing": False, "max_epochs": 2, "limit_train_batches": 4, **options}
    return L.Trainer(**options, callbacks=list(extra))


def fit(*extra: L.Callback, model: L.LightningModule | None = None, ckpt_path: Any = None, **options: Any) -> tuple:
    L.seed_everything(0, verbose=False)
    model, fitter = model or task(), trainer(*extra, **options)
    fitter.fit(model, datamodule=data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return model, fitter


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rank_of(weight: Tensor) -> int:
    return int(torch.linalg.matrix_rank(weight.detach().double(), rtol=1e-5))


class WeightRecorder(L.Callback):
    """Records the classifier's weight at the start of each validation."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append(pl_module.main_network[1].weight.detach().clone())


def test_shifts_after_the_last_step_of_its_epochs_and_before_their_validation() -> None:
    seen, shifting = WeightRecorder(), OptimumShifting(samples=20, start=0.4, every=2, guard=None, held_out=50)
    before: list[Tensor] = []
    shift = shifting.shift

    def noting(trainer: L.Trainer, pl_module: Any) -> Any:
        before.append(pl_module.network[1].weight.detach().clone())
        return shift(trainer, pl_module)

    shifting.shift = noting  # type: ignore[method-assign]
    model, fitter = fit(seen, shifting, max_epochs=5, num_sanity_val_steps=0)
    assert [(s["epoch"], s["step"]) for s in shifting.shifts] == [(3, 16), (4, 20)]
    assert torch.equal(seen.weights[4], model.network[1].weight)
    for epoch, old in zip((3, 4), before, strict=True):
        assert 0.5 < seen.weights[epoch].norm() / old.norm() < 0.999
    last = shifting.shifts[-1]
    assert last["layers"][0]["rows"] == last["samples"] == 20
    assert last["layers"][0]["norm_after"] == pytest.approx(seen.weights[4].norm().item(), rel=1e-5)
    assert last["loss_after"] == pytest.approx(last["loss_before"], abs=1e-5)
    logged = fitter.callback_metrics
    assert logged["shift/rank"] == last["layers"][0]["rank"]
    assert logged["shift/norm_ratio"] == pytest.approx(
        last["layers"][0]["norm_after"] / last["layers"][0]["norm_before"]
    )
    names = [
        "held_out_after",
        "held_out_before",
        "identity",
        "kappa_after",
        "kappa_before",
        "loss_after",
        "loss_before",
    ]
    expected = sorted([*names, "norm_ratio", "rank", "undone"])
    assert sorted(name[6:] for name in logged if name.startswith("shift/")) == expected
    assert model.network.training


def test_shift_of_full_rank_or_undone_leaves_training_unchanged() -> None:
    # the features of the whole training set have full rank
    shifting = OptimumShifting(selection="all", start=0.0, every=1)
    plain, _ = fit()
    shifted, _ = fit(shifting)
    assert [s["layers"][0]["status"] for s in shifting.shifts] == ["identity"] * 2
    assert shifting.shifts[0]["samples"] == shifting.shifts[0]["layers"][0]["rows"] > 200
    assert same(plain, shifted)
    undone = OptimumShifting(samples=2, start=0.0, every=1, guard=0.0, force=True)
    restored, _ = fit(undone)
    assert all(s["undone"] for s in undone.shifts)
    assert same(plain, restored)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    options = {"samples": 20, "start": 0.3, "every": 2, "guard": None}
    whole = OptimumShifting(**options)
    model, _ = fit(whole, max_epochs=4)
    assert [s["epoch"] for s in whole.shifts] == [2, 3]
    folder = run_callbacks(RunFolder(tmp_path / "run"))

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == stop:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(OptimumShifting(**options), Stop(), *folder, max_epochs=4, enable_checkpointing=True)
    again = OptimumShifting(**options)
    resumed, fitter = fit(again, max_epochs=4, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert fitter.fit_loop.epoch_progress.total.ready == 4
    assert again.shifts == whole.shifts
    assert same(model, resumed)


def test_run_folder_holds_shifts_shifted_weights_and_metrics(tmp_path: Path) -> None:
    run, shifting = RunFolder(tmp_path / "run"), OptimumShifting(samples=20, guard=None)
    extra = {"enable_checkpointing": True, "logger": RunLogger(run.path)}
    model, _ = fit(shifting, *run_callbacks(run), **extra)
    saved = torch.load(run.last, weights_only=True)
    assert torch.equal(saved["state_dict"]["network.1.weight"], model.network[1].weight)
    assert saved["callbacks"]["OptimumShifting"]["shifts"] == shifting.shifts
    assert json.loads((run.path / "shifts.json").read_text()) == shifting.shifts
    header, _, second = run.metrics.read_text().splitlines()
    row = dict(zip(header.split(","), second.split(","), strict=True))
    assert float(row["shift/identity"]) == 0
    assert {"val/acc", "train/loss", "shift/norm_ratio", "shift/kappa_after"} <= set(row)
    fit(OptimumShifting(at_end=False, every=5), *run_callbacks(run), enable_checkpointing=True)
    assert json.loads((run.path / "shifts.json").read_text()) == []  # those of the earlier fit are gone


class Early(EarlyStopping):
    def __init__(self, **options: Any) -> None:
        super().__init__("val/acc", mode="max", patience=1, stopping_threshold=0.0, **options)


def test_early_stopping_shifts_once_and_a_resumed_fit_shifts_again(tmp_path: Path) -> None:
    run, shifting = RunFolder(tmp_path / "run"), OptimumShifting(samples=20, guard=None)
    extra = {"enable_checkpointing": True, "logger": RunLogger(run.path)}
    model, _ = fit(shifting, Early(), *run_callbacks(run), max_epochs=9, **extra)
    assert [(s["epoch"], s["step"]) for s in shifting.shifts] == [(0, 4)]
    saved = torch.load(run.last, weights_only=True)
    assert torch.equal(saved["state_dict"]["network.1.weight"], model.network[1].weight)
    header, row = (line.split(",") for line in run.metrics.read_text().splitlines())  # one row, with the shift
    assert dict(zip(header, row, strict=True))["shift/identity"] == "0.0"
    again = OptimumShifting(samples=20, guard=None)
    _, fitter = fit(again, max_epochs=2, ckpt_path=run.last)
    assert fitter.global_step == 8
    assert [(s["epoch"], s["step"]) for s in again.shifts] == [(0, 4), (1, 8)]
    assert again.shifts[0] == shifting.shifts[0]


def test_model_checkpoint_holds_the_shift_or_a_warning_is_given(tmp_path: Path) -> None:
    for early in (True, False):
        shifting, saving = OptimumShifting(samples=20, guard=None), ModelCheckpoint(tmp_path / str(early))
        stopping, caught = Early(check_on_train_epoch_end=not early), contextlib.nullcontext()
        if not early:
            caught = pytest.warns(
                UserWarning, match="files of ModelCheckpoint were written before the shift at the end"
            )
        with caught:
            model, fitter = fit(stopping, shifting, saving, max_epochs=9, enable_checkpointing=True)
        assert [(s["epoch"], s["step"]) for s in shifting.shifts] == [(0, 4)]
        saved = torch.load(saving.best_model_path, weights_only=True)["state_dict"]["network.1.weight"]
        assert torch.equal(saved, model.network[1].weight) is early
        assert ("shift/rank" in fitter.callback_metrics) is early


@pytest.mark.parametrize(("options", "where"), [({"max_steps": 6}, (1, 6)), ({"max_steps": 4}, (0, 4))])
def test_max_steps_shifts_after_the_last_step(options: dict, where: tuple[int, int]) -> None:
    shifting = OptimumShifting(samples=20, guard=None)
    fit(shifting, max_epochs=9, **options)
    assert [(s["epoch"], s["step"]) for s in shifting.shifts] == [where]


@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_averaged_weights_are_shifted_at_the_end(tmp_path: Path, averaging: Any) -> None:
    run, shifting = RunFolder(tmp_path / "run"), OptimumShifting(samples=20, guard=None)
    plain, _ = fit(averaging(), max_epochs=3)
    shifted, _ = fit(averaging(), shifting, *run_callbacks(run), max_epochs=3, enable_checkpointing=True)
    assert len(shifting.shifts) == 1
    assert shifting.shifts[0]["layers"][0]["norm_before"] == pytest.approx(
        plain.network[1].weight.norm().item(), rel=1e-6
    )
    assert torch.equal(plain.network[0][1].weight, shifted.network[0][1].weight)
    assert shifted.network[1].weight.norm() < 0.999 * plain.network[1].weight.norm()
    saved = torch.load(run.last, weights_only=True)
    assert torch.equal(saved["state_dict"]["network.1.weight"], shifted.network[1].weight)
    with pytest.raises(ValueError, match="would overwrite the shift at the end: put OptimumShifting after it"):
        fit(OptimumShifting(), averaging())
    with pytest.raises(ValueError, match=r"^every=2 would make the average of"):
        fit(averaging(), OptimumShifting(every=2))


class Plain(L.LightningModule):
    """A user's own module, with batches of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class LossPlus100(OptimumShifting):
    def loss(self, pl_module: L.LightningModule, output: Any, batch: Any) -> Tensor:
        return 100 + super().loss(pl_module, output, batch)


@pytest.mark.parametrize("selection", ["class_balanced", "random", "class_means"])
@pytest.mark.filterwarnings("ignore:the output of layer")
def test_any_module_and_dataloader_are_shifted_with_an_own_loss(selection: str) -> None:
    digits = data()
    digits.setup()
    whole = list(digits.loader("train", shuffle=False))
    dataset = TensorDataset(torch.cat([b.image for b in whole]), torch.cat([b.target for b in whole]))
    shifting = LossPlus100(["body.0.1", "body.1"], selection=selection, guard=None)
    L.seed_everything(0, verbose=False)
    fitter, model = trainer(shifting), Plain()
    fitter.fit(model, DataLoader(dataset, 64, shuffle=True))
    (shift,) = shifting.shifts
    assert [layer["name"] for layer in shift["layers"]] == ["body.0.1", "body.1"]
    assert shift["loss_before"] > 100
    assert shift["layers"][1]["rows"] == (10 if selection == "class_means" else 47)  # one below the least width
    assert {"shift/rank/body.1", "shift/norm_ratio/body.0.1"} <= set(fitter.callback_metrics)


def test_classifier_adds_the_callback_and_saves_its_hyperparameters(tmp_path: Path) -> None:
    model = OptimumShiftingClassifier(
        "mlp_32", 10, input_shape=(1, 8, 8), samples=20, guard=None, every=1, start=0.0, mode="free"
    )
    _, fitter = fit(model=model)
    (shifting,) = [c for c in fitter.callbacks if isinstance(c, OptimumShifting)]
    assert [s["layers"][0]["mode"] for s in shifting.shifts] == ["free"] * 2
    fitter.save_checkpoint(tmp_path / "one.ckpt")
    again = OptimumShiftingClassifier.load_from_checkpoint(tmp_path / "one.ckpt")
    assert vars(again.shifting)["samples"] == 20
    assert (again.shifting.mode, again.shifting.every, again.shifting.guard) == ("free", 1, None)
    assert same(model, again)
    fitter.validate(model, datamodule=data(), verbose=False)
    assert sum(isinstance(c, OptimumShifting) for c in fitter.callbacks) == 1
    assert len(shifting.shifts) == 2


def test_shift_samples_are_balanced_disjoint_and_below_the_dimension() -> None:
    digits = data()
    digits.setup()
    net, common = network(), {"num_classes": 10, "held_out": 30}
    chosen, others = shift_samples(digits, net, **common)
    assert len(chosen.indices) == 47
    assert len(others.indices) == 30
    assert not set(chosen.indices) & set(others.indices)
    counts = torch.bincount(torch.as_tensor(digits.train_target[chosen.indices]))
    assert counts.max() - counts.min() <= 1
    assert len(shift_samples(digits, network(), ["0.1"], **common)[0].indices) == 63
    assert shift_samples(digits, net, num_classes=10, held_out=0)[1] is None
    everything, others = shift_samples(digits, net, selection="class_means", **common)
    assert set(everything.indices) == set(digits.train_indices.tolist())
    assert len(others.indices) == 30
    with pytest.raises(ValueError, match=r"^samples=9 are fewer than the 10 classes"):
        shift_samples(digits, net, samples=9, **common)
    assert len(shift_samples(digits, net, samples=9, force=True, **common)[0].indices) == 9
    assert len(shift_samples(digits, net, selection="random", held_out=0)[0].indices) == 47
    with pytest.raises(ValueError, match=r"^selection 'class_balanced' needs the number of classes"):
        shift_samples(digits, net)
    with pytest.raises(ValueError, match=r"^layer '1' has 48 inputs for 48 classes, so samples of all classes"):
        shift_samples(digits, net, num_classes=48)
    with pytest.raises(ValueError, match=r"^selection 'all' takes the whole training set"):
        shift_samples(digits, net, samples=9, selection="all", **common)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "some"}, "selection must be one of"),
        ({"mode": "some"}, "mode must be one of"),
        ({"momentum": "some"}, "momentum must be one of"),
        ({"start": 2.0}, "start must be at least 0 and at most 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"at_end": False}, "every=None with at_end=False never shifts"),
        ({"held_out": 0}, "guard=0.05 needs held-out"),
    ],
)
def test_wrong_arguments_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        OptimumShifting(**options)


class Average(Classification):
    """Its main network is a running average, which is updated after the callbacks."""

    def __init__(self) -> None:
        super().__init__(network(), 10, input_shape=(1, 8, 8))
        self.average = averaged_copy(self.network)

    @property
    def main_network(self) -> nn.Module:
        return self.average

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch.image), batch.target)

    def on_train_batch_end(self, *args: Any) -> None:
        update_average(self.average, self.network, 0.5)


def narrow() -> Classification:
    return Classification(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10)), 10, input_shape=(1, 8, 8)
    )


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([OptimumShifting(every=1)], {"max_epochs": -1, "max_steps": 2}, r"start=0\.5 is a share of max_epochs"),
        ([OptimumShifting(["2"])], {}, "layers: no module '2' in Sequential"),
        ([OptimumShifting(["0.2"])], {}, "layer '0.2' is a BatchNorm1d"),
        ([OptimumShifting(samples=9)], {}, "samples=9 are fewer than the 10 classes"),
        ([OptimumShifting()], {"model": narrow}, "layer '3' has 10 inputs for 10 classes, so samples of all classes"),
        ([OptimumShifting(samples=11, selection="random")], {}, "the 11 samples to shift on lack class"),
        ([OptimumShifting(samples=9000)], {}, "no training sample is left"),
        (
            [OptimumShifting(every=1)],
            {"model": Average},
            "every=1 needs trained layers, but no optimizer trains '1' of Seq",
        ),
        ([OptimumShifting(["1"]), OptimumShifting(["0.1"])], {}, "callbacks hold several OptimumShifting"),
        (
            [OptimumShifting()],
            {"model": lambda: OptimumShiftingClassifier("mlp_32", 10, input_shape=(1, 8, 8))},
            "OptimumShiftingClassifier adds its own OptimumShifting, got another",
        ),
    ],
)
def test_wrong_settings_raise_before_the_first_step(callbacks: list, options: dict, message: str) -> None:
    def steps(*args: Any) -> Any:
        raise AssertionError("a step was made")

    model = options.get("model", task)()
    model.training_step = steps
    with pytest.raises(ValueError, match=f"^{message}"):
        fit(*callbacks, **{**options, "model": model})


def test_running_average_is_shifted_after_its_last_update() -> None:
    shifting = OptimumShifting(samples=20, guard=None)
    model, _ = fit(shifting, model=Average())
    (shift,) = shifting.shifts
    assert shift["layers"][0]["norm_after"] == pytest.approx(model.average[1].weight.norm().item(), rel=1e-5)


def test_failing_shift_warns_and_the_training_goes_on() -> None:
    class Failing(OptimumShifting):
        def output(self, pl_module: L.LightningModule, batch: Any) -> Any:
            raise ValueError("no output")

    plain, _ = fit()
    shifting = Failing(start=0.0, every=1)
    with pytest.warns(UserWarning, match="no shift after epoch") as caught:
        model, _ = fit(shifting)
    texts = [str(w.message) for w in caught if "no shift" in str(w.message)]
    assert texts == [f"no shift after epoch {k} (no output); the training goes on" for k in range(2)]
    assert shifting.shifts == []
    assert same(plain, model)


class Regression(Plain):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 2, 1))


class Squared(OptimumShifting):
    def loss(self, pl_module: L.LightningModule, output: Any, batch: Any) -> Tensor:
        return output.square().mean()


@pytest.mark.parametrize(
    ("shifting", "body", "message"),
    [
        (OptimumShifting(), nn.Linear(8, 1), "Regression has one output and no num_classes"),
        (OptimumShifting(selection="random"), nn.Linear(8, 1), "Regression has one output and no num_classes"),
        (
            OptimumShifting(),
            nn.Linear(8, 2),
            r"targets must be classes, got torch.float32 \[1\]: for a regression or one",
        ),
        (OptimumShifting(["body.1"]), convolution(), "Regression has no nn.Linear and no num_classes"),
        (Squared(selection="random", samples=5, guard=None, held_out=9), nn.Linear(8, 1), ""),
        (Squared(["body.1"], selection="all"), convolution(), ""),
    ],
)
def test_regression_shifts_with_an_own_loss_or_raises(shifting: OptimumShifting, body: nn.Module, message: str) -> None:
    loader = DataLoader(TensorDataset(torch.randn(20, 8), torch.rand(20)), 10)
    fitter, model = trainer(shifting), Regression(body)
    if message:
        with pytest.raises(ValueError, match=f"^{message}"):
            fitter.fit(model, loader)
        assert fitter.global_step == 0
    else:
        fitter.fit(model, loader)
        assert len(shifting.shifts) == 1


def _fit_on_two_ranks() -> tuple[list, list]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    shifting = OptimumShifting(samples=21, guard=None, held_out=31)
    ddp = {} if "LOCAL_RANK" not in os.environ else {"strategy": "ddp", "devices": 2}
    model = Classification(net, 10, input_shape=(1, 8, 8), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fitter = trainer(shifting, max_epochs=1, limit_train_batches=1, precision="64-true", **ddp)
    fitter.fit(model, datamodule=data())
    return net[3].weight.tolist(), shifting.shifts


def test_two_processes_shift_as_one() -> None:
    first, second = on_two_ranks(_fit_on_two_ranks)
    assert first == second
    weight, (shift,) = _fit_on_two_ranks()
    assert torch.allclose(torch.tensor(first[0]), torch.tensor(weight), atol=1e-12)
    (other,) = first[1]
    assert other["layers"][0]["rows"] == shift["layers"][0]["rows"] == 21
    assert other["held_out_after"] == pytest.approx(shift["held_out_after"], abs=1e-12)
    assert other["layers"][0]["norm_after"] < other["layers"][0]["norm_before"]
