"""Shipped configs on a folder of images: a teacher is fine-tuned, its student distilled, new files predicted."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_kd
from lightning_kd.cli import main
from lightning_kd.deploy.exported_network import formats_missing
from lightning_kd.nets import build_network

SMALL = ["--data.root", "photos", "--data.image_size", "16", "--data.num_workers", "0", "--data.batch_size", "8"]
SHORT = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]


def test_fine_tuned_teacher_distils_a_student_that_predicts_new_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name, count in (("cats", 30), ("dogs", 8)):
        Path("photos", name).mkdir(parents=True)
        for k in range(count):
            pixels = draw.integers(0, 128, (20, 24, 3)) + (name == "dogs") * 100
            Image.fromarray(pixels.astype(np.uint8)).save(f"photos/{name}/{k}.png")
    torch.save(build_network("cnn_tiny", 10).state_dict(), "published.pt")
    teacher = ["--model.network", "cnn_tiny", "--model.weights", "published.pt", "--model.new_classifier", "true"]
    main(["fit", "--config", "distillation/finetune_folder", *SMALL, *SHORT, *teacher, "--data.balance", "true"])
    best = "runs/finetune_folder/checkpoints/best.ckpt"
    pair = ["--model.teacher", "cnn_tiny", "--model.teacher_weights", best, "--model.student", "cnn_tiny"]
    start = ["--model.student_weights", "published.pt", "--model.new_classifier", "true", "--run", "runs/student"]
    main(["fit", "--config", "distillation/kd_folder", *SMALL, *SHORT, *pair, *start])
    main(["test", "--config", "runs/student/config.yaml", "--ckpt_path", "best"])
    with Path("runs/student/confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], int(row["cats"]) + int(row["dogs"])) for row in rows] == [("cats", 6), ("dogs", 2)]
    with Path("runs/student/metrics.csv").open() as file:
        row = [row for row in csv.DictReader(file) if row.get("test/acc")][-1]
    mean = sum(float(row["accuracy"]) for row in rows) / 2
    assert abs(float(row["test/acc_macro"]) - mean) < 1e-6
    check_new_files(capsys)


def check_new_files(capsys):
    """Unlabelled files are predicted without the training photos; Python and exported files give the same."""
    Path("photos").rename("elsewhere")
    new = sorted(Path("elsewhere").glob("*/1*.png"))
    for k, path in enumerate(new):
        Path("new/deep").mkdir(parents=True, exist_ok=True)
        path.rename(f"new/deep/{k:02d}.png")
    quiet = ["--trainer.enable_progress_bar", "false"]
    main(["predict", "--config", "runs/student/config.yaml", "--ckpt_path", "best", "--data.predict", "new", *quiet])
    with Path("runs/student/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == [f"{k:02d}.png" for k in range(len(new))]
    found = lightning_kd.load("runs/student", device="cpu").predict("new")
    assert [row["class_name"] for row in rows] == list(found.names)
    expected = found.probabilities.max(1).values.tolist()
    assert [max(float(row["probability_0"]), float(row["probability_1"])) for row in rows] == pytest.approx(
        expected, abs=1e-4
    )
    capsys.readouterr()
    main(["export", "runs/student", "--format", "torchscript", "--images", "new"])
    assert float(capsys.readouterr().out.partition("differ by ")[2].split()[0]) < 1e-4
    if formats_missing():
        pytest.skip("the way ends before ONNX: needs lightning_kd[onnx]")
    main(["export", "runs/student", "--format", "onnx", "--images", "new"])
    assert float(capsys.readouterr().out.partition("differ by ")[2].split()[0]) < 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession("runs/student/exported.onnx", providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {"image": pixels_of(new_files())})
    table = [[float(row[f"probability_{k}"]) for k in range(2)] for row in rows]
    np.testing.assert_allclose(exported, table, atol=1e-4)


def new_files():
    return sorted(Path("new").rglob("*.png"))


def pixels_of(files):
    """As another program would read them: resized to a short side of 18, cut to the middle 16 x 16, from 0 to 1."""
    found = []
    for path in files:
        picture = Image.open(path).convert("RGB")
        scale = 18 / min(picture.size)
        picture = picture.resize([int(scale * side) for side in picture.size], Image.Resampling.BILINEAR)
        left, top = (round((side - 16) / 2) for side in picture.size)
        found.append(np.asarray(picture.crop((left, top, left + 16, top + 16)), dtype=np.float32) / 255)
    return np.stack(found).transpose(0, 3, 1, 2)
