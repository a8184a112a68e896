"""Checkpoints are written whole and checked when read; a fit resumes with its settings; a folder has one command."""

import csv
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lightning_kd import file_writing
from lightning_kd.cli import get_cli, main
from lightning_kd.cli.signals import Stopped, stopped_by_signals
from lightning_kd.core import Classification
from lightning_kd.core.checkpoint_files import RunCheckpointIO, read_checkpoint
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.run_logger import RunLogger
from lightning_kd.core.weights import load_weights
from lightning_kd.data import DigitsDataModule
from tests.forked import THREADS

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMOKE = ["--config", "_overlay/smoke", "--trainer.accelerator", "cpu", *QUIET]
STUDENT = ["--config", "distillation/student_digits", *SMOKE]


def error_of(capsys, words):
    """The one sentence that a failing command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    sentences = [line for line in lines if not line.startswith("(trace in ")]
    assert len(sentences) == 1, lines
    return sentences[0]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


# -- checkpoints on disk ---------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    io, path = RunCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"last.ckpt' could not be written, as the disk is full"):
            io.save_checkpoint({"state_dict": {}}, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.ones(3))
    first = path.read_bytes()
    io.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    assert path.read_bytes() == first  # the temporary name is not stored in it


def test_checkpoints_of_other_callbacks_are_written_by_run_checkpoint_io(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))  # where Lightning's own would write
    own = ModelCheckpoint(tmp_path / "own", "{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[own, *run_callbacks(RunFolder(tmp_path / "run"))],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classification("mlp_8", 10, input_shape=(1, 8, 8)), DigitsDataModule(fake=True))
    assert type(trainer.strategy.checkpoint_io) is RunCheckpointIO
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["epoch=0.ckpt"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A fit of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    here = Path.cwd()
    os.chdir(folder)
    try:
        main(["fit", *STUDENT, "--data.noise", "SymmetricNoise", "--data.noise.rate", "0.4", "--run", "r"])
    finally:
        os.chdir(here)
    return folder / "r"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "r"))


def flipped(content, where):
    """``content`` with one bit flipped, at the share ``where`` of its length."""
    place = int(where * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGES = {
    "emptied": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "last byte cut": lambda content: content[:-1],
    "other text": lambda content: b"<html>not found</html>\n" * 40,
    "zeros": lambda content: bytes(len(content)),
    **{f"flipped at {where}": lambda content, where=where: flipped(content, where) for where in (0.1, 0.3, 0.5, 0.7)},
}
COMMAND_THAT_READS = {
    "checkpoints/last.ckpt": ["test", "--config", "r/config.yaml", "--ckpt_path", "last", *QUIET],
    "metrics.csv": ["test", "--config", "r/config.yaml", "--ckpt_path", "last", *QUIET],
    "noise.npz": ["test", "--config", "r/config.yaml", "--ckpt_path", "last", *QUIET],
    "config.yaml": ["test", "--config", "r/config.yaml", "--ckpt_path", "last", *QUIET],
    "run.json": ["test", "--config", "r/config.yaml", "--ckpt_path", "last", *QUIET],
}


def check_damage(run, capsys, file, damage):
    """After the damage a command prints one sentence that names the file, or runs to its end."""
    path, before = run / file, rows(run)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    capsys.readouterr()
    try:
        main(COMMAND_THAT_READS[file])
    except SystemExit:
        err = capsys.readouterr().err.strip()
        sentences = [line for line in err.splitlines() if not line.startswith("(trace in ")]
        assert len(sentences) == 1, err
        assert path.name in sentences[0], err
        assert "weights_only" not in err
    else:
        after = rows(run)
        assert len(after) >= len(before)
        assert 0 <= float(after[-1]["test/acc"]) <= 1


@pytest.mark.parametrize("damage", ["emptied", "cut in half", "flipped at 0.5"])
@pytest.mark.parametrize("file", ["checkpoints/last.ckpt", "metrics.csv"])
def test_a_damaged_file_is_named_in_one_sentence_or_does_no_harm(run, capsys, file, damage):
    check_damage(run, capsys, file, damage)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", COMMAND_THAT_READS)
def test_each_file_with_each_damage_is_named_or_does_no_harm(run, capsys, file, damage):
    check_damage(run, capsys, file, damage)


def test_a_flipped_bit_in_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    content = {"state_dict": {"a": torch.arange(6.0), "b": torch.ones(2, 2)}, "epoch": 3}
    RunCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    good = (tmp_path / "a.ckpt").read_bytes()
    noticed = 0
    for place in range(0, len(good), 3):
        (tmp_path / "b.ckpt").write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            found = read_checkpoint(tmp_path / "b.ckpt")
        except ValueError:
            noticed += 1
            continue
        assert found["epoch"] == 3
        assert all(torch.equal(found["state_dict"][k], v) for k, v in content["state_dict"].items())
    assert noticed


def test_missing_and_wrong_checkpoint_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.ckpt: there is no such file; give last, best or"):
        read_checkpoint(tmp_path / "a.ckpt")
    torch.save([1], tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"b.ckpt holds no state_dict: give a checkpoint of lightning-kd fit"):
        read_checkpoint(tmp_path / "b.ckpt")
    torch.save({"state_dict": {}, "path": Path("x")}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"c.ckpt holds objects other than tensors and plain values: give another"):
        read_checkpoint(tmp_path / "c.ckpt")
    trusted = RunCheckpointIO().load_checkpoint(tmp_path / "c.ckpt", weights_only=False)
    assert trusted["path"] == Path("x")
    (tmp_path / "d.ckpt").write_bytes(pickle.dumps({"state_dict": Path("x")}))
    with pytest.raises(ValueError, match=r"d.ckpt is damaged, or no checkpoint"):
        read_checkpoint(tmp_path / "d.ckpt")


def test_weights_with_a_flipped_bit_raise(tmp_path):
    network = torch.nn.Linear(8, 4)
    torch.save(network.state_dict(), tmp_path / "n.pt")
    with zipfile.ZipFile(tmp_path / "n.pt") as archive:
        part = next(info for info in archive.infolist() if "/data/0" in info.filename)
        good = archive.read(part)
    content = (tmp_path / "n.pt").read_bytes()
    place = content.index(good)
    (tmp_path / "n.pt").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"n.pt' cannot be read: the file is damaged"):
        load_weights(network, tmp_path / "n.pt")


# -- what later commands keep -----------------------------------------------------------------------------------------


def test_flags_before_the_config_of_a_run_win_over_it(run, capsys):
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert not {"run", "overwrite", "ckpt_path", "weights_only"} & saved.keys()
    cli = get_cli(["--model.label_smoothing", "0.3", "--config", "r/config.yaml", *QUIET])
    assert cli.model.label_smoothing == 0.3
    # as older versions wrote it
    with (run / "config.yaml").open("a") as file:
        file.write("run: null\noverwrite: false\nckpt_path: null\n")
    before = (run / "checkpoints/last.ckpt").read_bytes()
    main(["fit", "--run", "new", "--overwrite", "--trainer.max_epochs", "1", "--config", "r/config.yaml", *QUIET])
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert read_checkpoint("new/checkpoints/last.ckpt")["epoch"] == 0
    assert "none.ckpt" in error_of(
        capsys, ["sharpness", "--ckpt_path", "none.ckpt", "--config", "r/config.yaml", *QUIET]
    )


def test_flags_win_over_hyperparameters_of_a_checkpoint(run):
    words = ["test", "--config", "r/config.yaml", "--ckpt_path", "r/checkpoints/last.ckpt", *QUIET]
    cli = get_cli([*words, "--model.label_smoothing", "0.3"], run=True)
    assert cli.model.label_smoothing == 0.3
    assert "test/acc" in rows(run)[-1]


@pytest.mark.parametrize("ended", [True, False])
def test_resuming_a_finished_fit_with_ema_keeps_the_averaged_network(tmp_path, ended):
    fit = ["fit", "--config", "flatness/ema_digits", *SMOKE, "--run", "r"]
    main(fit)
    before = torch.load("r/network.pt", weights_only=True)
    last = read_checkpoint("r/checkpoints/last.ckpt")
    assert not all(torch.equal(before[k], last["current_model_state"][f"network.{k}"]) for k in before)
    if not ended:
        Path("r/network.pt").unlink()
    main([*fit, "--ckpt_path", "last"])
    after = torch.load("r/network.pt", weights_only=True)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_results_missing_after_a_kill_are_written_by_resuming(run):
    results = ["noisy_labels.csv", "network.pt"]
    main(["fit", "--config", "noisy_labels/ce_digits", *SMOKE, "--run", "n"])
    kept = {name: Path("n", name).read_bytes() for name in results}
    for lost in results:
        Path("n", lost).unlink()
        record = RunFolder("n")
        record.record = record.read_record()
        record.end("running")  # as a kill leaves it
        main(["fit", "--config", "noisy_labels/ce_digits", *SMOKE, "--run", "n", "--ckpt_path", "last"])
        assert {name: Path("n", name).read_bytes() for name in ["noisy_labels.csv"]} == {
            "noisy_labels.csv": kept["noisy_labels.csv"]
        }
        assert Path("n", "network.pt").is_file()
        assert RunFolder("n").fit_is_finished()


def test_lost_or_cut_rows_of_metrics_are_restored_by_resuming(run, capsys):
    whole = rows(run)
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    noise = ["--data.noise", "SymmetricNoise", "--data.noise.rate", "0.4"]
    more = ["fit", *STUDENT, *noise, "--run", "r", "--ckpt_path", "last", "--trainer.max_epochs", "3"]
    (run / "metrics.csv").write_text("".join(lines[:-1]))
    main(more)
    assert rows(run)[:2] == whole
    (run / "metrics.csv").write_text("".join(lines)[:-20])  # cut within a row
    with pytest.warns(UserWarning, match=r"damaged .* renamed to metrics.csv.damaged, and a new one is written"):
        main([*more[:-1], "4"])
    assert (run / "metrics.csv.damaged").read_text() == "".join(lines)[:-20]
    assert rows(run)[:2] == whole
    assert [row["epoch"] for row in rows(run)] == ["0", "1", "2", "3"]


def test_logging_to_a_damaged_metrics_file_raises_and_leaves_it(tmp_path):
    for text, what in (
        ("epoch,step,a\n0,1,0.5\n1,3,0.", "its last line is cut"),
        ("epoch,step,a\n0,1\n", "line 2 is no row"),
        ("epoch,step,a\n0,1,x\n", "line 2 is no row"),
        ("a,b\n1,2\n", "its first line names no epoch"),
    ):
        (tmp_path / "metrics.csv").write_text(text)
        logger = RunLogger(tmp_path)
        for _ in range(2):  # it raises the second time too
            with pytest.raises(ValueError, match=rf"metrics.csv is damaged \({what}"):
                logger.log_metrics({"epoch": 2, "a": 1.0}, step=5)
        assert (tmp_path / "metrics.csv").read_text() == text


# -- resuming with the same settings, and one command at a time ------------------------------------------------------


def test_resuming_with_other_settings_is_refused(run, capsys):
    config = (run / "config.yaml").read_bytes()
    noise = ["--data.noise", "SymmetricNoise", "--data.noise.rate", "0.4"]
    more = ["fit", *STUDENT, *noise, "--run", "r", "--ckpt_path", "last", "--trainer.max_epochs", "3"]
    for change, key in (
        (["--model.optimizer.lr", "0.3"], "model.init_args.optimizer.init_args.lr=0.05, got 0.3"),
        (["--data.batch_size", "7"], "data.init_args.batch_size="),
        (["--seed_everything", "5"], "seed_everything=0, got 5"),
        (["--model.network", "mlp_8"], "model.init_args.network="),
    ):
        assert f"the run in {run} was made with {key}" in error_of(capsys, [*more, *change])
    assert (run / "config.yaml").read_bytes() == config
    # settings that do not change the training
    same = ["--trainer.precision", "32-true", "--trainer.gradient_clip_val", "0", "--model.optimizer.foreach", "false"]
    main([*more, "--data.eval_batch_size", "50", "--trainer.log_every_n_steps", "2", *same])
    assert len(rows(run)) == 3


def test_resuming_from_another_run_in_a_used_folder_needs_overwrite(run, tmp_path, capsys):
    before = (run / "checkpoints/last.ckpt").read_bytes()
    fit = ["fit", *STUDENT, "--run", "other"]
    main(fit)
    mine = Path("other/checkpoints/last.ckpt").read_bytes()
    noise = ["--data.noise", "SymmetricNoise", "--data.noise.rate", "0.4"]
    more = [*fit, *noise, "--ckpt_path", "r/checkpoints/last.ckpt", "--trainer.max_epochs", "3"]
    assert "other holds a last.ckpt: add" in error_of(capsys, more)
    assert Path("other/checkpoints/last.ckpt").read_bytes() == mine
    main([*more, "--overwrite"])
    assert [row["epoch"] for row in rows(Path("other"))] == ["0", "1", "2"]  # two of them from the checkpoint
    assert (run / "checkpoints/last.ckpt").read_bytes() == before


def test_a_run_with_a_long_path_saves_its_config_and_resumes(tmp_path):
    run = "a folder of the laboratory with many words in its name/" * 2 + "and one more that is long/run one"
    main(["fit", *STUDENT, "--trainer.max_epochs", "1", "--run", run])
    saved = yaml.safe_load(Path(run, "config.yaml").read_text())
    assert saved["data"]["init_args"]["noise"] is None
    main(["fit", *STUDENT, "--run", run, "--ckpt_path", "last"])
    assert len(rows(Path(run))) == 2


def test_resuming_takes_other_weights_only_where_the_old_file_is_gone(tmp_path, capsys):
    torch.save(get_cli(STUDENT).model.network.state_dict(), "a.pt")
    fit = ["fit", *STUDENT, "--run", "r", "--model.weights"]
    main([*fit, "a.pt"])
    more = ["--ckpt_path", "last", "--trainer.max_epochs", "3"]
    shutil.copy("a.pt", "b.pt")
    assert "made with model.init_args.weights=a.pt, got b.pt" in error_of(capsys, [*fit, "b.pt", *more])
    Path("a.pt").unlink()
    main([*fit, "b.pt", *more])


def test_resuming_past_the_length_of_a_fixed_schedule_is_refused(tmp_path, capsys):
    schedule = "torch.optim.lr_scheduler.CosineAnnealingLR"
    fit = ["fit", *STUDENT, "--model.lr_scheduler", schedule, "--model.lr_scheduler.T_max", "2", "--run", "r"]
    main(fit)
    message = error_of(capsys, [*fit, "--ckpt_path", "last", "--trainer.max_epochs", "4"])
    assert (
        "has a length of its own (model.init_args.lr_scheduler.init_args.T_max=2), got max_epochs=4 after 2" in message
    )
    main([*fit, "--ckpt_path", "last"])
    # up to the length of the schedule it may be resumed
    main([*fit, "--run", "s", "--trainer.max_epochs", "1"])
    main([*fit, "--run", "s", "--ckpt_path", "last"])
    assert len(rows(Path("s"))) == 2


def test_a_second_command_in_a_run_folder_is_refused(run, capsys):
    before = (run / "run.json").read_bytes()
    with RunFolder(run).alone():
        for words in (["fit", *STUDENT, "--overwrite", "--run", "r"], COMMAND_THAT_READS["metrics.csv"]):
            assert "another command works in r: wait until it has ended" in error_of(capsys, words)
    assert (run / "run.json").read_bytes() == before
    assert not list(run.glob(".*"))


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_raises_stopped_with_its_exit_status(name, status):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    if before != signal.SIG_DFL:
        pytest.skip(f"{name} has a handler here")

    def wait():
        with stopped_by_signals():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(Stopped) as stopped:
        wait()
    assert stopped.value.code == status
    assert signal.getsignal(number) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_prints_the_outcome_and_the_command_to_resume(tmp_path):
    (tmp_path / "stopping.py").write_text(
        "import os, signal\nfrom torch import nn\n\n\nclass Stopping(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        if self.training and os.path.exists('r/checkpoints/best.ckpt'):\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n        return self.layer(x.flatten(1))\n"
    )
    words = [*STUDENT, "--run", "r", "--model.network.class_path", "stopping.Stopping"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_kd", "fit", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": THREADS, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 143, done.stderr
    assert "fit interrupted after 1 epoch" in done.stdout
    assert done.stdout.rstrip().endswith("--ckpt_path last")
    assert RunFolder(tmp_path / "r").read_record()["outcome"] == "interrupted"


def test_file_names_that_are_not_utf8_are_written_to_results(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(24):
        path = tmp_path / "data" / ("train", "test")[k % 3 == 2] / str(k % 2) / os.fsdecode(b"caf\xe9_%02d.png" % k)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    data = ["--data", "ImageFolderDataModule", "--data.root", "data", "--data.image_size", "8", "--data.val_fraction"]
    words = ["--model", "CrossEntropy", "--model.network", "mlp_8", *data, "0", "--run", "r", *QUIET]
    main(["fit", *words, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"])
    main(["predict", "--config", "r/config.yaml", "--ckpt_path", "last", *QUIET])
    for name in ("noisy_labels.csv", "predictions.csv"):
        assert "caf\\udce9_0" in Path("r", name).read_text(encoding="utf-8")


class WithOwnKey(Classification):
    """Stores a key of its own in its checkpoints."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["metrics"] = {"acc": 1.0}


def test_a_checkpoint_with_a_key_of_the_user_is_resumed(tmp_path):
    for epochs, path in ((1, None), (2, RunFolder(tmp_path).last)):
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=RunLogger(tmp_path),
            callbacks=run_callbacks(RunFolder(tmp_path)),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        task = WithOwnKey("mlp_8", 10, input_shape=(1, 8, 8))
        trainer.fit(task, DigitsDataModule(fake=True), ckpt_path=path, weights_only=True)
    assert len(rows(tmp_path)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    held = RunFolder(tmp_path).alone()
    held.__enter__()
    there, here = os.pipe()
    child = os.fork()
    if not child:
        os.write(here, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(there, 1)
    try:
        os.close(file_writing._HELD.pop())  # as a kill does; worker processes of a loader outlive it
        with RunFolder(tmp_path).alone():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        held.__exit__(None, None, None)
