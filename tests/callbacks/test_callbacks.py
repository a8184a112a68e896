"""The curve of test accuracy and the pictures of labels during a training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn

from lightning_kd import callbacks
from lightning_kd.callbacks import LabelPictures, label_pictures, label_score_figure, reliability_figure
from lightning_kd.core import Classification
from lightning_kd.core.mixture import Mixture, fit_mixture
from lightning_kd.data import DigitsDataModule
from lightning_kd.metrics import reliability
from tests.two_processes import on_two_ranks

PNG = b"\x89PNG"


class Scores(NamedTuple):
    score: Tensor
    mixture: Mixture | None
    clean_probability: Tensor
    given: Tensor
    clean: Tensor | None
    threshold: float = 0.5


def scores(known: bool = True) -> Scores:
    clean = torch.arange(200) % 2
    given = torch.where(torch.arange(200) < 60, 1 - clean, clean)
    score = ((given == clean) + 0.2 * torch.randn(200, generator=torch.Generator().manual_seed(0))).double()
    mixture = fit_mixture(score)
    return Scores(score, mixture, mixture.posterior(score)[:, 1], given, clean if known else None)


class Method(Classification):
    """A task with label scores and with dropout."""

    def __init__(self, **options: Any) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10))
        super().__init__(network, 10, input_shape=(1, 8, 8), **options)

    def label_scores(self) -> Scores:
        return scores()


def trainer(tmp_path: Path | str, *extra: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return L.Trainer(
        **{**quiet, "max_epochs": 2, "default_root_dir": tmp_path, "enable_checkpointing": False, **options},
        callbacks=list(extra),
    )


def data(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(fake=True, eval_batch_size=7, **options)


class Modes(L.Callback):
    """Checks that the callback before it restored the train modes and gradients, and keeps what it logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert all(module.training for module in pl_module.modules() if module is not pl_module.network[3])
        assert not pl_module.network[3].training
        assert torch.is_grad_enabled()
        names = ("curve/acc", "curve/ece", "curve/acc_last")
        self.logged.append({name: float(trainer.callback_metrics[name]) for name in names})


class FrozenDropout(L.Callback):
    """One module in eval mode during training."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.network[3].eval()


def test_curve_equals_the_metrics_of_trainer_test(tmp_path: Path) -> None:
    curve, modes = callbacks.TestCurve(last=2), Modes()
    method, digits = Method(), data()
    fitter = trainer(tmp_path, FrozenDropout(), curve, modes, max_epochs=3)
    fitter.fit(method, digits)
    (tested,) = fitter.test(method, digits, verbose=False)
    assert modes.logged[-1]["curve/acc"] == pytest.approx(tested["test/acc"])
    assert modes.logged[-1]["curve/ece"] == pytest.approx(tested["test/ece"], rel=1e-4)
    accuracies = [row["curve/acc"] for row in modes.logged]
    expected = [accuracies[0], sum(accuracies[:2]) / 2, sum(accuracies[1:]) / 2]
    assert [row["curve/acc_last"] for row in modes.logged] == pytest.approx(expected)


def test_callbacks_leave_the_trained_weights_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_pictures, "_keep", lambda *args: None)  # no drawing, which is slow
    weights = []
    for extra in ([], [callbacks.TestCurve(), LabelPictures(every=1)]):
        torch.manual_seed(1)
        method = Method()
        trainer(tmp_path, *extra).fit(method, data())
        weights.append(method.network.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resumed_curve_keeps_its_earlier_accuracies(tmp_path: Path) -> None:
    curve = callbacks.TestCurve(last=3)
    fitter = trainer(tmp_path, curve, enable_checkpointing=True, logger=CSVLogger(tmp_path))
    fitter.fit(Method(), data())
    path = tmp_path / "two.ckpt"
    fitter.save_checkpoint(path)
    again = callbacks.TestCurve(last=3)
    trainer(tmp_path, again, max_epochs=3).fit(Method(), data(), ckpt_path=path, weights_only=True)
    before, after = curve.state_dict()["accuracies"], again.state_dict()["accuracies"]
    assert len(before) == 2
    assert after[:2] == before
    assert len(after) == 3


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.5, 9)])
def test_curve_respects_the_limit_of_test_batches(tmp_path: Path, limit: float, batches: int) -> None:
    curve, method, digits = callbacks.TestCurve(), Method(), data()
    trainer(tmp_path, curve, max_epochs=1, limit_test_batches=limit).fit(method, digits)
    whole = list(digits.test_dataloader())
    assert len(whole) == 19
    some = whole[:batches]
    with torch.no_grad():
        right = torch.cat([method.eval()(batch.image).argmax(1) == batch.target for batch in some])
    assert curve.state_dict()["accuracies"] == pytest.approx([right.double().mean().item()])


def test_curve_without_test_batches_logs_nothing(tmp_path: Path) -> None:
    curve = callbacks.TestCurve()
    fitter = trainer(tmp_path, curve, max_epochs=1, limit_test_batches=0)
    fitter.fit(Method(), data())
    assert curve.state_dict()["accuracies"] == []
    assert not [name for name in fitter.callback_metrics if name.startswith("curve/")]


class OwnData(L.LightningDataModule):
    """A user's data module, whose test set exists only after ``setup("test")``."""

    def setup(self, stage: str) -> None:
        made = data()
        made.setup()
        self.train = made.loader("train", batch_size=64) if stage == "fit" else self.train
        if stage == "test":
            self.test = made.loader("test")

    def train_dataloader(self) -> Any:
        return self.train

    def test_dataloader(self) -> Any:
        return self.test


def test_curve_takes_the_test_set_of_a_users_data_module(tmp_path: Path) -> None:
    curve = callbacks.TestCurve()
    trainer(tmp_path, curve, max_epochs=1).fit(Method(), OwnData())
    assert len(curve.state_dict()["accuracies"]) == 1


def test_curve_starts_anew_with_each_fit(tmp_path: Path) -> None:
    curve = callbacks.TestCurve(last=5)
    fitter = trainer(tmp_path, curve)
    fitter.fit(Method(), data())
    first = curve.state_dict()["accuracies"]
    assert curve._loader is None  # or the test set would stay in memory
    fitter.fit_loop.max_epochs = 3
    fitter.fit(Method(), data())  # the same fit goes on
    assert curve.state_dict()["accuracies"][:2] == first
    trainer(tmp_path, curve).fit(Method(), data())
    assert len(curve.state_dict()["accuracies"]) == 2


def _curve_on_two_ranks(folder: str) -> list[float]:
    curve = callbacks.TestCurve()
    torch.manual_seed(0)
    method = Method()
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 1, "limit_train_batches": 1}
    fitter = trainer(folder, curve, LabelPictures(), **options)
    fitter.fit(method, data())
    with torch.no_grad():
        method.eval()
        digits = data()
        digits.setup()
        batches = list(digits.test_dataloader())
        right = torch.cat([method(batch.image).argmax(1) == batch.target for batch in batches])
    return [*curve.state_dict()["accuracies"], right.double().mean().item()]


def test_curve_of_two_processes_covers_the_whole_test_set(tmp_path: Path) -> None:
    first, second = on_two_ranks(_curve_on_two_ranks, str(tmp_path))
    assert first[0] == second[0] == pytest.approx(first[1])
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["label_scores.png", "reliability.png"]


def test_curve_wrong_arguments_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^last must be at least 1, got 0"):
        callbacks.TestCurve(last=0)
    with pytest.raises(ValueError, match=r"^TestCurve takes the test set from a data module"):
        trainer(tmp_path, callbacks.TestCurve()).fit(Method(), data().loader("train"))


class Figures:
    """A fake TensorBoard writer that keeps the tag and step of each figure."""

    def __init__(self) -> None:
        self.added: list[tuple[str, int]] = []

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        self.added.append((tag, global_step))


class FigureLogger(Logger):
    """Takes figures and ignores the rest."""

    name = version = "figures"

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Figures()

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_label_pictures_are_written_and_logged_every_second_epoch(tmp_path: Path) -> None:
    logger = FigureLogger()
    fitter = trainer(tmp_path, LabelPictures(every=2), max_epochs=3, logger=logger)
    fitter.fit(Method(), data())
    written = {path.name: path.read_bytes()[:4] for path in (tmp_path / "pictures").iterdir()}
    names = ["label_scores.png", "label_scores_epoch002.png", "reliability.png", "reliability_epoch002.png"]
    assert written == dict.fromkeys(names, PNG)
    tags = ["pictures/reliability", "pictures/label_scores"]
    steps = fitter.global_step
    assert logger.experiment.added == [(tag, step) for step in (2 * steps // 3, steps) for tag in tags]


def test_task_without_label_scores_gets_only_the_reliability_picture(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no picture")
        trainer(tmp_path, LabelPictures(split="val"), max_epochs=1).fit(
            Classification("mlp_8", 10, input_shape=(1, 8, 8)), data()
        )
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["reliability.png"]


def test_failed_picture_warns_and_the_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method()
    monkeypatch.setattr(method, "label_scores", lambda: 1 / 0)
    fitter = trainer(tmp_path, LabelPictures(every=1))
    with pytest.warns(UserWarning, match=r"no picture label_scores after 1 epoch \(ZeroDivisionError"):
        fitter.fit(method, data())
    assert fitter.current_epoch == 2
    assert (tmp_path / "pictures" / "reliability.png").is_file()


def test_label_pictures_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r"^every must be at least 1, got 0"):
        LabelPictures(every=0)
    with pytest.raises(ValueError, match=r"^split must be 'test' or 'val', got 'train'"):
        LabelPictures(split="train")  # type: ignore[arg-type]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("known", [True, False])
def test_label_score_figure_has_legend_title_and_unit_area(known: bool) -> None:
    found = scores(known)
    share = float((found.clean_probability > 0.5).double().mean())
    figure = label_score_figure(found, "Mine")
    (axes,) = figure.axes
    expected = ["clean labels (140)", "wrong labels (60)"] if known else ["all labels (200)"]
    assert [label for label in legend(figure) if "labels" in label] == expected
    assert [label for label in legend(figure) if "Gaussian" in label] == [
        "Gaussian 1 (weight 0.30)",
        "Gaussian 2 (weight 0.70)",
    ]
    assert axes.get_title() == f"Mine: {share:.1%} taken for clean"
    area = sum(bar.get_height() * bar.get_width() for bar in axes.patches)
    assert area == pytest.approx(1)  # comparable with the density of the mixture


def test_label_score_figure_is_drawn_for_equal_scores_without_mixture() -> None:
    same = Scores(torch.ones(5), None, torch.ones(5), torch.zeros(5).long(), torch.zeros(5).long())
    figure = label_score_figure(same)
    figure.canvas.draw()
    assert legend(figure) == ["clean labels (5)", "wrong labels (0)"]


def test_reliability_figure_shows_worked_numbers() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    figure = reliability_figure(reliability(probabilities, torch.tensor([0, 1, 1, 1]), bins=5), "Test")
    above, below = figure.axes
    assert above.get_title() == "Test: ECE 0.375, accuracy 75.0%"
    assert [bar.get_height() for bar in below.patches] == pytest.approx([0.25, 0.25, 0.5])
    assert [bar.get_height() for bar in above.patches[:3]] == pytest.approx([1, 1, 0.5])
