"""Confusion table and accuracy averaged over classes, and class weights in the loss."""

import csv
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import nn

from lightning_kd.cli import main
from lightning_kd.core import Classification
from lightning_kd.core.class_metrics import ConfusionMetric, are_unequal, write_confusion
from lightning_kd.data import ArrayDataModule

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
SIZES = (40, 10, 6)


def trainer(tmp_path, **options):
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, **QUIET, **options)


def arrays(tmp_path, sizes=SIZES, name="a"):
    rows = np.random.default_rng(0)
    target = np.repeat(["=cat", "dog", "a, b"][: len(sizes)], sizes)
    feature = rows.normal(size=(len(target), 4)).astype(np.float32)
    np.savez(
        tmp_path / f"{name}.npz", train_feature=feature, train_target=target, test_feature=feature, test_target=target
    )
    return str(tmp_path / f"{name}.npz")


def test_confusion_table_and_macro_accuracy_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores, target = torch.randn(80, 5, generator=generator), torch.randint(0, 4, (80,), generator=generator)
    metric = ConfusionMetric(5)
    metric.tells_macro = True
    for part in range(0, 80, 20):
        metric.update(scores[part : part + 20], target[part : part + 20])
    predicted = scores.argmax(1)
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score(target, predicted)
    assert metric.compute() == {"acc_macro": pytest.approx(expected)}
    assert metric.table.tolist() == confusion_matrix(target, predicted, labels=range(5)).tolist()
    silent = ConfusionMetric(5)
    silent.update(scores, target)
    assert silent.compute() == {}


def test_classes_are_unequal_above_three_to_one():
    assert not are_unequal(None)
    assert not are_unequal(torch.tensor([30, 10]))
    assert are_unequal(torch.tensor([31, 10]))
    assert are_unequal(torch.tensor([5, 0]))


@pytest.mark.parametrize(("sizes", "told"), [(SIZES, True), ((20, 20, 20), False)])
def test_macro_accuracy_is_logged_only_for_unequal_classes(tmp_path, sizes, told):
    data = ArrayDataModule(arrays(tmp_path, sizes), val_fraction=0.2)
    task, fitting = Classification("mlp_8", 3, input_shape=(4,)), trainer(tmp_path)
    fitting.fit(task, data)
    assert ("val/acc_macro" in fitting.callback_metrics) == told
    (found,) = fitting.test(task, data, verbose=False)
    assert ("test/acc_macro" in found) == told
    table = task.confusion
    assert table.sum(1).tolist() == [sizes[0], sizes[2], sizes[1]]  # classes are sorted by name
    assert float(table.diagonal().sum() / table.sum()) == pytest.approx(found["test/acc"])
    if told:
        assert float((table.diagonal() / table.sum(1)).mean()) == pytest.approx(found["test/acc_macro"])


def test_confusion_csv_and_picture_are_written(tmp_path):
    table = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert [path.name for path in write_confusion(tmp_path, table, ["=cat", "dog", "$a, b"])] == [
        "confusion.csv",
        "confusion.png",
    ]
    with (tmp_path / "confusion.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["class", "count", "accuracy", "'=cat", "dog", "$a, b"],
            ["'=cat", "4", "0.75", "3", "1", "0"],
            ["dog", "2", "1.0", "0", "2", "0"],
            ["$a, b", "0", "", "0", "0", "0"],
        ]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300
    write_confusion(tmp_path, table, [])
    assert (tmp_path / "confusion.csv").read_text().startswith("class,count,accuracy,0,1,2\n0,4,0.75")


def test_failed_picture_warns_and_keeps_the_csv(tmp_path, monkeypatch):
    table = torch.eye(2, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_confusion(tmp_path, table, ["日本", "b"])  # no warning for a name that the font lacks
    monkeypatch.setattr("lightning_kd.core.class_metrics.confusion_figure", lambda *given: 1 / 0)
    with pytest.warns(UserWarning, match=r"no picture confusion.png \(ZeroDivisionError"):
        written = write_confusion(tmp_path, table, ["a", "b"])
    assert [path.name for path in written] == ["confusion.csv"]
    assert not (tmp_path / "confusion.png").exists()  # that of the earlier call is removed


def test_test_command_writes_confusion_files_and_overwrite_removes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "distillation/teacher_digits", "--config", "_overlay/smoke", "--model.network", "cnn_tiny"]
    words += ["--trainer.limit_test_batches", "1.0", "--run", "r", "--trainer.enable_progress_bar", "false"]
    main(["fit", *words])
    main(["test", "--config", "r/config.yaml", "--ckpt_path", "last"])
    with Path("r/confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [str(k) for k in range(10)]
    assert sum(int(row["count"]) for row in rows) > 10
    assert Path("r/confusion.png").is_file()
    main(["fit", *words, "--overwrite"])
    assert not list(Path("r").glob("confusion.*"))


# -- weights of classes ----------------------------------------------------------------------------------------------


def test_class_weights_give_torchs_weighted_cross_entropy():
    logits, target = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 2, 2, 0])
    task = Classification(nn.Linear(4, 3), 3, input_shape=(4,), class_weights=[1, 5.0, 0.5], label_smoothing=0.1)
    expected = F.cross_entropy(logits, target, weight=torch.tensor([1, 5, 0.5]), label_smoothing=0.1)
    assert float(task.loss(None, logits, target)["ce"]) == pytest.approx(float(expected))
    assert task.loss(None, logits.double(), target)["ce"].dtype == torch.float64
    assert {*task.state_dict()} == {"network.weight", "network.bias"}
    assert task.hparams.class_weights == [1, 5.0, 0.5]


def test_balanced_weights_count_training_samples_only(tmp_path):
    data = ArrayDataModule(arrays(tmp_path), val_fraction=0.5)
    task = Classification(nn.Linear(4, 3), 3, input_shape=(4,), class_weights="balanced")
    trainer(tmp_path).fit(task, data)
    # text labels are numbered in sorted order: "=cat", "a, b", "dog"
    assert task._weight.tolist() == pytest.approx([28 / (3 * n) for n in (20, 3, 5)])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "^class_weights needs 3 numbers, one for each class, got 2"),
        ([1.0, 0.0, 2.0], "^class_weights must be above 0, got 0.0"),
        ("equal", "^class_weights must be 'balanced' or a list of numbers, got 'equal'"),
    ],
)
def test_wrong_class_weights_raise(weights, message):
    with pytest.raises(ValueError, match=message):
        Classification(nn.Linear(4, 3), 3, input_shape=(4,), class_weights=weights)


def test_balanced_weights_need_a_data_module_without_balance(tmp_path):
    task = Classification(nn.Linear(4, 3), 3, input_shape=(4,), class_weights="balanced")
    rows = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^class_weights='balanced' counts the classes of a data module"):
        trainer(tmp_path).fit(task, torch.utils.data.DataLoader(rows, batch_size=4))
    with pytest.raises(ValueError, match="both correct for the sizes of the classes"):
        trainer(tmp_path).fit(task, ArrayDataModule(arrays(tmp_path), balance=True))
