"""A new kind of problem, regression, needs one subclass of ``Problem`` and one data module."""

import csv

import pytest
import torch
from torchmetrics import MeanAbsoluteError

from lightning_kd.cli import main
from lightning_kd.core import Problem, SingleLabel
from lightning_kd.data import Arrays, LabelledDataModule


class Regression(Problem):
    """The targets are numbers, one or several a sample."""

    kind = "numbers (Regression)"
    monitored, monitor_mode = "mae", "min"
    training_metric = "mae"

    def logits(self, output, image, network, name=""):
        if output.shape != (len(image), self.num_classes):
            raise ValueError(f"{type(network).__name__} gives {list(output.shape)}, expected [B, {self.num_classes}]")
        return output

    def check_target(self, target):
        if target.shape[1:] != (self.num_classes,):
            raise ValueError(f"target must be [B, {self.num_classes}], got {list(target.shape)}")

    def loss(self, logits, target, **options):
        return (logits - target).square().mean()

    def training_values(self, logits, target):
        return (logits - target).abs().mean(1), None

    def metrics(self):
        return {"mae": MeanAbsoluteError()}

    def predict(self, scores, probabilities):
        return {"prediction": scores, "distance": scores.abs().sum(1)}


class SumsDataModule(LabelledDataModule):
    """Rows of six numbers; the target is the sum of the first three."""

    sums: tuple[str, ...] = ("sum",)

    def __init__(self, batch_size: int = 32, seed: int = 0, fake: bool = False):
        super().__init__(
            class_names=[*self.sums],
            input_shape=(6,),
            mean=[0.0] * 6,
            std=[1.0] * 6,
            batch_size=batch_size,
            seed=seed,
            fake=fake,
            problem=Regression(len(self.sums)),
        )

    def load_arrays(self):
        rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
        target = rows[:, :3].sum(1, keepdim=True)
        return Arrays(rows[:320], target[:320], rows[320:], target[320:])


COMMAND = [
    *("--model", "lightning_kd.Supervised", "--model.network", "mlp_16", "--data", f"{__name__}.SumsDataModule"),
    *("--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr", "0.01"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "true"),
]


def recorded_values(run, name):
    with (run / "metrics.csv").open() as file:
        values = [row[name] for row in csv.DictReader(file) if row.get(name)]
    return [float(value) for value in values]


def test_regression_trains_resumes_tests_and_predicts(tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    main(["fit", *COMMAND, "--run", str(run), "--trainer.max_epochs", "4"])
    main(["fit", *COMMAND, "--run", str(run), "--trainer.max_epochs", "8", "--ckpt_path", "last"])
    main(["fit", *COMMAND, "--run", str(whole), "--trainer.max_epochs", "8"])
    curve = recorded_values(run, "val/mae")
    assert curve == recorded_values(whole, "val/mae")
    assert len(curve) == 8
    assert curve[-1] < 0.5 * curve[0]
    assert len(recorded_values(run, "train/mae")) == 8
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["epoch"] == min(range(8), key=curve.__getitem__)  # the smallest is the best
    main(["test", *COMMAND, "--run", str(run), "--ckpt_path", "last"])
    assert recorded_values(run, "test/mae")[0] < 1
    assert "test/mae" in capsys.readouterr().out
    main(["predict", *COMMAND, "--run", str(run), "--ckpt_path", "last"])
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    for row in rows:
        assert float(row["distance"]) == pytest.approx(abs(float(row["prediction_0"])), rel=1e-4)
    data = SumsDataModule()
    data.setup()
    error = sum(abs(float(row["prediction_0"]) - float(data.test_target[int(row["index"])])) for row in rows) / 80
    assert error == pytest.approx(recorded_values(run, "test/mae")[0], rel=1e-3)


class ByLoss(Regression):
    """Without metrics: monitored by its loss."""

    monitored, training_metric = "loss", "loss_again"

    def metrics(self):
        return {}


class ByLossDataModule(SumsDataModule):
    def __init__(self, fake: bool = False):
        super().__init__(fake=fake)
        self.problem = ByLoss(1)


def test_curve_of_a_problem_without_metrics_records_its_loss(tmp_path):
    run = tmp_path / "run"
    data = ["--data", f"{__name__}.ByLossDataModule", "--trainer.callbacks", "lightning_kd.callbacks.TestCurve"]
    main(["fit", *COMMAND, *data, "--run", str(run), "--trainer.max_epochs", "2"])
    curve = recorded_values(run, "curve/loss")
    assert recorded_values(run, "curve/loss_last")[-1] == pytest.approx(sum(curve) / 2)
    main(["test", *COMMAND, *data, "--run", str(run), "--ckpt_path", "last"])
    assert recorded_values(run, "test/loss")[0] == pytest.approx(curve[-1], rel=1e-5)


class TwoSumsDataModule(SumsDataModule):
    sums = ("sum", "other")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "SumsDataModule",
            "num_classes must be at least 2, got 1: give the number of classes, or take the task",
        ),
        ("TwoSumsDataModule", "Classification is for KIND, but TwoSumsDataModule has numbers (Regression): use a task"),
    ],
)
def test_classification_of_regression_data_exits_with_an_error(data, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("fit", "--model", "Classification", "--model.network", "mlp_16"),
                *("--data", f"{__name__}.{data}", "--run", str(tmp_path / "run")),
            ]
        )
    assert stop.value.code == 1
    assert message.replace("KIND", SingleLabel.kind) in capsys.readouterr().err
