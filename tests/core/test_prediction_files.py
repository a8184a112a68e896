"""Prediction files of each kind of problem."""

import csv
import os
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from lightning_kd.core import (
    Batch,
    Classification,
    MultiLabelClassification,
    Segmentation,
    SemanticSegmentation,
    SingleLabel,
)
from lightning_kd.core.prediction_files import colours
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.data import ArrayDataModule, ImageFolderDataModule
from tests.two_processes import on_two_ranks

NAMES = ["sky", "road", "car", "tree"]


def predicted(folder, task, data, **options):
    callbacks = [c for c in run_callbacks(RunFolder(folder)) if not hasattr(c, "best_model_path")]
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    outputs = trainer.predict(task, data)
    if not trainer.is_global_zero:
        return outputs, []
    with (folder / "predictions.csv").open() as file:
        return outputs, list(csv.DictReader(file))


def arrays(kind):
    return ArrayDataModule("none.npz", kind=kind, fake=True, class_names=NAMES, eval_batch_size=24)


def test_multi_label_predictions_are_written_with_probabilities(tmp_path):
    outputs, rows = predicted(tmp_path, MultiLabelClassification("cnn_tiny", 4), arrays("multi_label"))
    assert [int(row["index"]) for row in rows] == list(range(128))
    probabilities = torch.cat([one["probabilities"] for one in outputs])
    for row, expected in zip(rows, probabilities.tolist(), strict=True):
        assert row["labels"] == "|".join(name for name, p in zip(NAMES, expected, strict=True) if p >= 0.5)
        assert [float(row[f"probability_{k}"]) for k in range(4)] == pytest.approx(expected, rel=1e-4)
    assert any("|" in row["labels"] for row in rows)


def test_image_folder_predictions_have_path_and_class_name(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a, b", "c"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(3):
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    data = ImageFolderDataModule(str(tmp_path / "images"), image_size=16, num_workers=0)
    _, rows = predicted(tmp_path / "run", Classification("cnn_tiny", 2, input_shape=(3, 16, 16)), data)
    assert len(rows) == 6
    for row in rows:
        assert row["path"].startswith(str(tmp_path / "images" / "test"))
        assert row["class_name"] == ["a, b", "c"][int(row["prediction"])]


def test_network_with_more_classes_than_the_data_writes_no_class_name(tmp_path):
    task = Classification("cnn_tiny", 12)
    _, rows = predicted(tmp_path, task, ArrayDataModule("none.npz", fake=True))
    assert len(rows) == 128
    assert "class_name" not in rows[0]
    assert "probability_11" in rows[0]


def check_masks(folder, rows, outputs):
    for row in rows:
        mask = np.asarray(Image.open(folder / row["mask"]))
        assert mask.dtype == np.uint8
        assert mask.shape == (32, 32)
    for one in outputs:
        for index, mask in zip(one["index"], one["prediction"], strict=True):
            stored = np.asarray(Image.open(folder / f"predictions/{int(index):06d}.png"))
            np.testing.assert_array_equal(stored, mask.numpy())


def test_masks_and_their_overview_picture_are_written(tmp_path):
    outputs, rows = predicted(tmp_path, SemanticSegmentation("fcn_tiny", 4), arrays("segmentation"))
    assert [row["mask"] for row in rows] == [f"predictions/{k:06d}.png" for k in range(64)]
    check_masks(tmp_path, rows, outputs)
    page = np.asarray(Image.open(tmp_path / "predictions.png"))
    assert page.shape == (4 * 32, 4 * 32, 3)  # eight pairs of image and mask, two in a row
    known = {tuple(colour) for colour in colours(4).tolist()}
    assert {tuple(pixel) for pixel in page[:32, 32:64].reshape(-1, 3).tolist()} <= known
    assert not list(tmp_path.rglob("*.part"))


def _predict_masks_on_a_rank(folder):
    outputs, rows = predicted(
        Path(folder), SemanticSegmentation("fcn_tiny", 4), arrays("segmentation"), devices=2, strategy="ddp"
    )
    check_masks(Path(folder), [], outputs)
    return len(rows)


def test_two_processes_write_all_masks_and_one_table(tmp_path):
    assert on_two_ranks(_predict_masks_on_a_rank, str(tmp_path)) == [64, 0]
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 64


def test_auxiliary_head_is_trained_only_with_a_weight():
    task = SemanticSegmentation("fcn_tiny", 4)
    before = task.network.aux_classifier.weight.clone()
    L.Trainer(accelerator="cpu", max_steps=2, barebones=True).fit(task, arrays("segmentation"))
    assert not torch.equal(before, task.network.aux_classifier.weight)
    task = SemanticSegmentation("fcn_tiny", 4, aux_weight=0.0)
    logits = torch.zeros(1, 4, 2, 2)
    assert list(task.loss({"out": logits, "aux": logits}, logits, torch.zeros(1, 2, 2).long())) == ["ce"]


def test_separator_in_label_names_is_escaped(tmp_path):
    data = ArrayDataModule("none.npz", kind="multi_label", fake=True, class_names=["a|b", "c", "d", "e"])
    _, rows = predicted(tmp_path, MultiLabelClassification("cnn_tiny", 4), data)
    assert any(r"a\|b" in row["labels"] for row in rows)
    assert not any("a|b" in row["labels"] for row in rows)


def test_fast_dev_run_leaves_predictions_alone(tmp_path):
    (tmp_path / "predictions.csv").write_text("index\n7\n")
    _, rows = predicted(tmp_path, MultiLabelClassification("cnn_tiny", 4), arrays("multi_label"), fast_dev_run=True)
    assert rows == [{"index": "7"}]


@pytest.mark.parametrize(("limit", "noted"), [(2, True), (0.5, True), (1.0, False), (6, False), (100, False)])
def test_predicting_only_a_part_of_the_batches_prints_a_note(limit, noted, tmp_path, capsys):
    predicted(tmp_path, MultiLabelClassification("cnn_tiny", 4), arrays("multi_label"), limit_predict_batches=limit)
    said = capsys.readouterr().err
    part = f"predictions are of {2 if limit == 2 else 3} of 6 batches, as limit_predict_batches={limit}: leave it out"
    assert (part in said) == noted
    assert ("predictions are of" in said) == noted


def test_earlier_masks_are_removed_and_other_files_stay(tmp_path):
    task = SemanticSegmentation("fcn_tiny", 4)
    predicted(tmp_path, task, arrays("segmentation"))
    for name in ("notes.txt", "mine.png"):
        (tmp_path / "predictions" / name).write_text("mine")
    _, rows = predicted(tmp_path, task, arrays("segmentation"), limit_predict_batches=1)
    assert 0 < len(rows) < 64
    assert (tmp_path / "predictions" / "mine.png").exists()
    stored = sorted(path.name for path in (tmp_path / "predictions").glob("0*.png"))
    assert stored == [f"{k:06d}.png" for k in range(len(rows))]
    assert (tmp_path / "predictions" / "notes.txt").exists()


@pytest.mark.parametrize("count", [255, 256, 257, 300])
def test_masks_of_many_classes_keep_their_values(count, tmp_path):
    writer = Segmentation(count).prediction_writer()
    scores = torch.zeros(1, count, 2, 2)
    scores[0, count - 1, 0, 0] = 1
    batch = Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2), torch.tensor([5]))
    outputs = {"index": batch.index, **Segmentation(count).predict(scores, None)}
    writer.add(tmp_path, outputs, batch, None)
    writer.finish(tmp_path, None)
    stored = np.asarray(Image.open(tmp_path / "predictions" / "000005.png"))
    assert stored.tolist() == [[count - 1, 0], [0, 0]]


def _write_from_rank_1_only(folder):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, problem, scores in (
        ("table", SingleLabel(3), torch.eye(3)[:2]),
        ("masks", Segmentation(3), torch.zeros(2, 3, 4, 4)),
    ):
        writer = problem.prediction_writer()
        (Path(folder) / name).mkdir(exist_ok=True)
        if rank == 1:
            batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([4, 2]))
            outputs = {"index": batch.index, **problem.predict(scores, scores)}
            writer.add(Path(folder) / name, outputs, batch, None)
        writer.finish(Path(folder) / name, None)
    return rank


def test_files_are_complete_where_a_process_has_no_batch(tmp_path):
    assert on_two_ranks(_write_from_rank_1_only, str(tmp_path)) == [0, 1]
    assert (tmp_path / "table" / "predictions.csv").read_text().splitlines()[1:] == ["2,1,0,1,0", "4,0,1,0,0"]
    rows = (tmp_path / "masks" / "predictions.csv").read_text().splitlines()
    assert rows == ["index,mask", "2,predictions/000002.png", "4,predictions/000004.png"]


def test_empty_batch_writes_no_file(tmp_path):
    writer = Segmentation(3).prediction_writer()
    batch = Batch(torch.zeros(0, 3, 2, 2), torch.zeros(0, 2, 2), torch.zeros(0, dtype=torch.int64))
    writer.add(tmp_path, {"index": batch.index, "prediction": torch.zeros(0, 2, 2)}, batch, None)
    writer.finish(tmp_path, None)
    assert not (tmp_path / "predictions.csv").exists()


class WithEntropy(Classification):
    def predict_step(self, batch, batch_idx):
        found = super().predict_step(batch, batch_idx)
        p = found["probabilities"]
        return {**found, "entropy": -(p * p.log()).sum(1), "note": ["a"] * len(p)}


def test_extra_tensors_of_predict_step_become_columns(tmp_path):
    _, rows = predicted(tmp_path, WithEntropy("cnn_tiny", 10), ArrayDataModule("none.npz", fake=True))
    p = torch.tensor([float(rows[0][f"probability_{k}"]) for k in range(10)])
    assert float(rows[0]["entropy"]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-3)
    assert "note" not in rows[0]
