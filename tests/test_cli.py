"""The commands as a user types them, through the real ``main`` or the real process."""

import csv
import json
import re

import pytest
import torch
import yaml

import lightning_kd
from lightning_kd.cli import get_cli, main
from lightning_kd.cli.command_words import default_run_folder, resume_command
from lightning_kd.cli.config_names import config_names, config_path, with_config_paths
from lightning_kd.core.run_folder import RunFolder
from tests.conftest import ROOT

TEACHER = ["--config", "distillation/teacher_digits"]
DHKD = ["--config", "distillation/dhkd_digits", "--model.teacher_weights", "random"]
SMOKE = ["--config", "_overlay/smoke", "--trainer.enable_progress_bar", "false"]


def rows(run):
    with (run / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_changelog_and_citation_name_this_version():
    released = re.findall(r"^## \[(\d[\d.]*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == (lightning_kd.__version__, str(citation["date-released"]))
    assert citation["version"] == lightning_kd.__version__


def test_version_help_and_list_are_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-kd {lightning_kd.__version__}\n"
    main([])
    assert "lightning-kd fit --config distillation/dhkd_digits" in capsys.readouterr().out
    main(["list"])
    out = capsys.readouterr().out
    for name in (
        "DHKD",
        "Classification",
        "SAM",
        "OptimumShifting",
        "CIFAR100DataModule",
        "resnet8x4",
        "distillation/dhkd_digits",
    ):
        assert f" {name}" in out
    assert "  distillation/dhkd_digits " in out


@pytest.mark.parametrize("argument", [["--model.help", "DHKD"], ["--data.help", "DigitsDataModule"], ["--help"]])
def test_help_names_the_options_of_a_verb_or_class(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *argument])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    expected = {"--model.help": ("--model.temperature", "gradient_alignment", "ce_weight", "lr_interval")}
    for text in expected.get(argument[0], ("--data.batch_size",) if len(argument) > 1 else ("--run", "--overwrite")):
        assert text in out


def test_print_config_of_a_printed_config_is_the_same(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["fit", *DHKD, "--print_config"])
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "mine.yaml"), "--print_config"])
    assert capsys.readouterr().out == text


def test_unknown_config_lists_near_names(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "distillation/dhkd_digit"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --config 'distillation/dhkd_digit' is neither a file nor a shipped config")
    assert "distillation/dhkd_digits" in error
    assert error.count("\n") == 1


def test_config_names_paths_order_of_flags_and_default_run_folder(tmp_path):
    assert "distillation/dhkd_digits" in config_names()
    own = tmp_path / "own.yaml"
    own.write_text("")
    assert config_path(str(own)) == str(own)
    args, paths = with_config_paths(["fit", "-c", str(own), "--config=distillation/kd_digits", "--x", "y"])
    assert args == ["fit", "--config", paths[0], "--config", paths[1], "--x", "y"]
    # flags win even over a config that follows them; a class also goes before the config, whose settings are for it
    args, _ = with_config_paths(["--x", "y", "--model", "KD", f"--config={own}", "--model.y=1"])
    assert args == ["--model", "KD", "--config", str(own), "--x", "y", "--model", "KD", "--model.y=1"]
    assert default_run_folder([*paths, config_path("_overlay/smoke")], "kd") == "runs/own-kd_digits"
    assert default_run_folder([], "kd") == "runs/kd"


def test_resume_command_adds_ckpt_path_last_and_drops_overwrite():
    assert resume_command("lightning-kd fit --a 'b c' --overwrite") == "lightning-kd fit --a 'b c' --ckpt_path last"
    assert resume_command("lightning-kd fit --overwrite true --x 1") == "lightning-kd fit --x 1 --ckpt_path last"
    assert resume_command("lightning-kd fit --ckpt_path=last --overwrite -c 1") == (
        "lightning-kd fit -c 1 --ckpt_path last"
    )
    assert resume_command("lightning-kd fit --ckpt_path best --x 1") == "lightning-kd fit --x 1 --ckpt_path last"
    assert resume_command("lightning-kd fit --overwrite True --x 1") == "lightning-kd fit --x 1 --ckpt_path last"


def test_fit_test_predict_in_one_folder(tmp_path, capsys):
    run = tmp_path / "runs" / "dhkd_digits"
    main(["fit", *DHKD, *SMOKE])
    out = capsys.readouterr().out
    assert "fit finished after 2 epochs: val/acc" in out
    assert f"lightning-kd test --config runs/{run.name}/config.yaml --ckpt_path last" in out
    record = json.loads((run / "run.json").read_text())
    assert record["outcome"] == "finished"
    assert record["seed"] == 0
    assert record["command"].startswith("lightning-kd fit --config distillation/dhkd_digits")
    assert {"torch", "lightning"} <= record["versions"].keys()
    assert record["start"] <= record["end"]
    assert len(rows(run)) == 2
    state = torch.load(run / "student.pt", weights_only=True)
    plain = lightning_kd.build_network("cnn_tiny", 10, 1)
    plain.load_state_dict(state)

    main(["test", "--config", f"runs/{run.name}/config.yaml", "--ckpt_path", "last", *SMOKE])
    assert [row["test/acc"] == "" for row in rows(run)] == [True, False]  # in the row of the epoch that was tested
    main(["validate", "--config", f"runs/{run.name}/config.yaml", "--ckpt_path", "last", *SMOKE])
    assert [row["epoch"] for row in rows(run)] == ["0", "1", "1"]
    assert rows(run)[2]["val/acc"] == rows(run)[1]["val/acc"]
    main(["predict", "--config", f"runs/{run.name}/config.yaml", "--ckpt_path", "best", *SMOKE])
    with (run / "predictions.csv").open() as stream:
        predictions = list(csv.DictReader(stream))
    assert [int(row["index"]) for row in predictions] == list(range(len(predictions)))
    probabilities = [float(predictions[0][f"probability_{k}"]) for k in range(10)]
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)
    assert int(predictions[0]["prediction"]) == max(range(10), key=probabilities.__getitem__)
    record = json.loads((run / "run.json").read_text())
    assert [entry["verb"] for entry in record["history"]] == ["fit", "test", "validate"]
    assert record["class_names"] == record["history"][0]["class_names"] == [str(digit) for digit in range(10)]


def test_a_finished_fit_is_replaced_only_with_overwrite(tmp_path, capsys):
    main(["fit", *TEACHER, *SMOKE])
    before = (tmp_path / "runs/teacher_digits/checkpoints/last.ckpt").read_bytes()
    with pytest.raises(SystemExit):
        main(["fit", *TEACHER, *SMOKE])
    error = capsys.readouterr().err
    assert "holds a last.ckpt: add --ckpt_path last to go on, --overwrite" in error
    assert error.count("\n") == 1
    assert (tmp_path / "runs/teacher_digits/checkpoints/last.ckpt").read_bytes() == before
    with pytest.raises(SystemExit):  # a wrong option must not delete the earlier run
        main(["fit", *TEACHER, *SMOKE, "--overwrite", "--data.batch_size", "-3"])
    assert (tmp_path / "runs/teacher_digits/checkpoints/last.ckpt").read_bytes() == before
    main(["fit", *TEACHER, *SMOKE, "--overwrite", "--seed_everything", "1"])
    assert len(rows(tmp_path / "runs/teacher_digits")) == 2
    assert (tmp_path / "runs/teacher_digits/checkpoints/last.ckpt").read_bytes() != before


def test_evaluating_untrained_weights_beside_trained_ones_is_refused(tmp_path, capsys):
    main(["fit", *TEACHER, *SMOKE])
    before = rows(tmp_path / "runs/teacher_digits")
    for verb in ("test", "validate", "predict"):
        with pytest.raises(SystemExit):
            main([verb, *TEACHER, *SMOKE])
        assert f"{verb} without --ckpt_path would take untrained weights" in capsys.readouterr().err
    assert rows(tmp_path / "runs/teacher_digits") == before


def test_overwrite_leaves_nothing_of_the_earlier_fit(tmp_path):
    main(["fit", *TEACHER, *SMOKE])
    with pytest.raises(SystemExit):  # at this learning rate the loss is not finite
        main(["fit", *TEACHER, *SMOKE, "--overwrite", "--model.network", "mlp_32", "--model.optimizer.lr", "1e30"])
    folder = RunFolder("runs/teacher_digits")
    assert not (folder.path / "network.pt").exists()
    assert torch.load(folder.last, weights_only=True)["global_step"] == 0  # of the new fit
    assert not folder.best.exists()


def test_last_checkpoint_holds_the_best_score_including_its_own_epoch(tmp_path):
    main(["fit", *TEACHER, *SMOKE, "--run", "x"])
    state = torch.load("x/checkpoints/last.ckpt", weights_only=True)["callbacks"]["RunCheckpoint[best]"]
    scores = [float(row["val/acc"]) for row in rows(tmp_path / "x")]
    assert float(state["best_model_score"]) == pytest.approx(max(scores))
    assert scores[-1] == pytest.approx(max(scores))  # else the test could not fail


def test_fast_dev_run_changes_no_file_of_the_run(tmp_path):
    main(["fit", *TEACHER, *SMOKE])
    folder = tmp_path / "runs/teacher_digits"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    main(["fit", *TEACHER, *SMOKE, "--trainer.fast_dev_run", "true", "--overwrite"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_moved_run_writes_to_its_new_folder(tmp_path):
    main(["fit", *TEACHER, *SMOKE, "--run", "x"])
    (tmp_path / "x").rename(tmp_path / "y")
    main(["fit", *TEACHER, *SMOKE, "--run", "x", "--seed_everything", "1"])
    main(["test", "--config", "y/config.yaml", *SMOKE, "--ckpt_path", "last"])
    assert "test/acc" in rows(tmp_path / "y")[-1]
    assert "test/acc" not in rows(tmp_path / "x")[-1]
    # the best score moves too: a worse epoch does not overwrite best.ckpt
    best = (tmp_path / "y/checkpoints/best.ckpt").read_bytes()
    score = max(float(row["val/acc"]) for row in rows(tmp_path / "y"))
    config = tmp_path / "y/config.yaml"
    config.write_text(config.read_text().replace("    mean: null\n", "    mean: [90.0]\n"))
    main(["fit", "--config", "y/config.yaml", *SMOKE, "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    assert float(rows(tmp_path / "y")[-1]["val/acc"]) <= score
    assert (tmp_path / "y/checkpoints/best.ckpt").read_bytes() == best


def test_own_callbacks_work_and_averages_save_no_teacher_weights(tmp_path):
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "    init_args: {monitor: val/acc, mode: max, filename: mine}\n"
        "  - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n    init_args: {logging_interval: step}\n"
        "  - class_path: lightning.pytorch.callbacks.EMAWeightAveraging\n"
    )
    normalised = ["--model.teacher_mean", "[0.1]", "--model.teacher_std", "[0.5]"]
    main(["fit", *DHKD, *SMOKE, "--config", "more.yaml", *normalised])
    found = rows(tmp_path / "runs/dhkd_digits-more")
    assert {row["epoch"] for row in found if row["lr-SGD"]} == {"0", "1"}
    main(
        ["fit", *DHKD, *SMOKE, "--config", "more.yaml", *normalised, "--ckpt_path", "last", "--trainer.max_epochs", "3"]
    )
    state = torch.load(tmp_path / "runs/dhkd_digits-more/checkpoints/last.ckpt", weights_only=True)
    assert not [k for part in ("state_dict", "current_model_state") for k in state[part] if k.startswith("teacher.")]


def test_results_are_written_with_checkpoints_off(tmp_path, capsys):
    off = ["--trainer.enable_checkpointing", "false"]
    main(["fit", *TEACHER, *SMOKE, *off])
    assert "next: lightning-kd test" not in capsys.readouterr().out
    main(["predict", *TEACHER, *SMOKE, *off, "--model.weights", "runs/teacher_digits/network.pt"])
    assert (tmp_path / "runs/teacher_digits/predictions.csv").is_file()
    main(
        [
            "fit",
            *TEACHER,
            "--config",
            "_overlay/smoke",
            "--trainer.barebones",
            "true",
            "--trainer.log_every_n_steps",
            "null",
            "--trainer.limit_val_batches",
            "null",
            "--run",
            "bare",
        ]
    )


def test_error_of_a_wrong_option_is_short(capsys):
    with pytest.raises(SystemExit):
        main(["fit", *TEACHER, "--model.temperature", "3"])
    assert len(capsys.readouterr().err) < 800


def test_ckpt_path_last_without_a_checkpoint_gives_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["fit", *TEACHER, *SMOKE, "--ckpt_path", "last"])
    assert "error: ckpt_path 'last': there is no runs/teacher_digits/checkpoints/last.ckpt" in capsys.readouterr().err


def test_missing_teacher_weights_give_one_sentence_and_leave_no_folder(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "distillation/dhkd_digits", *SMOKE])
    error = capsys.readouterr().err
    assert error.startswith("error: teacher_weights: weights 'runs/teacher_digits/network.pt': there is no such file")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_optimizer_has_the_arguments_of_its_config_alone():
    cli = get_cli(
        [
            "--config",
            "distillation/kd_imagenet",
            "--model.student",
            "cnn_tiny",
            "--model.teacher",
            "cnn",
            "--model.teacher_weights",
            "random",
            *SMOKE,
        ]
    )
    optimizer = cli.model.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.SGD
    assert {k: optimizer.defaults[k] for k in ("lr", "momentum", "weight_decay", "nesterov", "dampening")} == {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": False,
        "dampening": 0.0,
    }


def test_get_cli_builds_trainer_model_and_data_that_train(tmp_path):
    cli = get_cli([*TEACHER, *SMOKE, "--run", str(tmp_path / "here")])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert (tmp_path / "here" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "here" / "metrics.csv").is_file()
    last = rows(tmp_path / "here")[-1]
    assert float(cli.trainer.callback_metrics["val/acc"]) == pytest.approx(float(last["val/acc"]), rel=1e-4)
    assert float(last["train/loss"]) > 0


def test_a_network_class_of_the_working_folder_is_trained_and_loaded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Sequential):\n"
        "    def __init__(self, width: int = 3):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    main(["fit", *TEACHER, *SMOKE, "--model.network", "my_nets.Mine", "--model.network.width", "7"])
    checkpoint = tmp_path / "runs/teacher_digits/checkpoints/last.ckpt"
    task = lightning_kd.Classification.load_from_checkpoint(checkpoint)
    assert task.network[1].out_features == 7
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
