"""``lightning-kd teach``: stores the teacher's logits for a config, and trainings from the store."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from lightning_kd.cli import get_cli, main
from lightning_kd.core import Classification
from lightning_kd.distillation import TeacherStore

KD = ["--config", "distillation/kd_digits", "--config", "_overlay/smoke"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL = ["--data.fake", "true", "--trainer.accelerator", "cpu", *QUIET]


@pytest.fixture
def weights():
    torch.manual_seed(0)
    path = Path("runs/teacher_digits/network.pt")
    path.parent.mkdir(parents=True)
    torch.save(Classification("cnn", 10, input_shape=(1, 8, 8)).network.state_dict(), path)
    return path


def test_teach_writes_a_store_that_fit_can_use_without_the_teacher(weights, capsys):
    main(["teach", *KD, *SMALL])
    out = capsys.readouterr().out
    store = Path("runs/teacher_digits/network.store")
    assert f"{store}: logits of 9 views of 100 images, float16" in out
    assert f"next: lightning-kd fit --config ... --model.teacher_store {store}" in out
    assert sorted(path.name for path in store.parent.iterdir()) == ["network.pt", "network.store", "network.store.json"]
    assert not Path("runs/kd_digits").exists()
    header = json.loads(Path(f"{store}.json").read_text())
    assert header["teacher"]["name"] == "cnn"
    assert 0 <= header["reached"]["acc"] <= 1
    weights.unlink()
    main(["fit", *KD, *SMALL, "--model.teacher_store", str(store)])
    rows = Path("runs/kd_digits/metrics.csv").read_text()
    assert "val/teacher_acc" in rows
    main(["test", "--config", "runs/kd_digits", *QUIET, "--ckpt_path", "last"])

    # the config of a run that trained from a store
    torch.save(Classification("cnn", 10, input_shape=(1, 8, 8)).network.state_dict(), weights)
    capsys.readouterr()
    main(["teach", "--config", "runs/kd_digits", "--out", "plain.store", "--views", "plain", "--dtype", "float32"])
    captured = capsys.readouterr()
    assert "plain.store: logits of 1 view of 100 images, float32" in captured.out
    assert "this store is for training without augmentation" in captured.err
    assert TeacherStore("plain.store").header["keys"] == 1


def test_wrong_teach_options_give_one_sentence_and_leave_no_files(weights, capsys):
    for words, sentence in (
        (
            ["--views", "many"],
            "error: views must be 'all', 'plain' or a number above 0, got 'many': give one of them\n",
        ),
        (["--compress", "soft"], "error: compress must be 'hard', 'smoothing', 'marginal_smoothing_kN' or"),
        (
            ["--data.cutout", "3"],
            "error: keys need a single view by crop and flip, got views=('weak',) and cutout=3",
        ),
        (["--model.teacher_weights", "gone.pt"], "error: teacher_weights: weights 'gone.pt': there is no such file"),
    ):
        with pytest.raises(SystemExit) as failed:
            main(["teach", *KD, *SMALL, *words])
        assert failed.value.code == 1
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["teach", "--config", "distillation/student_digits", *SMALL])
    assert "error: teach needs a distillation, whose teacher it asks, got Classification" in capsys.readouterr().err
    assert [path.name for path in Path("runs").rglob("*")] == ["teacher_digits", "network.pt"]


def test_fixed_views_are_noted_and_no_validation_set_stores_no_accuracy(weights, capsys):
    main(["teach", *KD, *SMALL, "--views", "4", "--out", "four.store", "--data.val_fraction", "0"])
    assert "training with this store sees 4 fixed views of each image" in capsys.readouterr().err
    assert TeacherStore("four.store").reached == {}
    main(["fit", *KD, *SMALL, "--data.val_fraction", "0", "--model.teacher_store", "four.store"])


def test_teach_from_python_returns_the_path_of_the_store(weights):
    cli = get_cli([*KD, *SMALL])
    path = cli.trainer.teach(cli.model, cli.datamodule, out="python.store")
    assert TeacherStore(path).header["answers"] == "logits"


def test_interrupted_teach_says_how_to_go_on(weights, capsys, monkeypatch):
    from lightning_kd.cli import teach_command

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(teach_command, "teach_store", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["teach", *KD, *SMALL])
    assert capsys.readouterr().out.endswith(
        f"teach interrupted\ngo on with: lightning-kd teach {shlex.join([*KD, *SMALL])}\n"
    )
