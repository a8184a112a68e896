"""Read-only run folders, full disks, and folders that are removed while a command runs."""

import errno
import json
import os
import shutil
from pathlib import Path

import lightning as L
import pytest

from lightning_kd.cli import main
from lightning_kd.core.run_folder import RunFolder

QUIET = ["--trainer.enable_progress_bar", "false"]
FIT = ["fit", "--config", "distillation/teacher_digits", "--config", "_overlay/smoke", *QUIET, "--run", "x"]
LAST = ["--config", "x/config.yaml", "--ckpt_path", "last", *QUIET]


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(FIT)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path):
    shutil.copytree(trained_once / "x", tmp_path / "x")
    return tmp_path / "x"


def break_writing(monkeypatch, number, folder, names=""):
    """Let every write below ``folder`` fail, or only those of the files in ``names``."""
    from lightning_kd import file_writing

    def new_part(path):
        if folder in path.absolute().parents and (not names or path.name in names):
            raise OSError(number, os.strerror(number))
        return real(path)

    real = file_writing._new_part
    monkeypatch.setattr(file_writing, "_new_part", new_part)


@pytest.fixture
def read_only(trained, monkeypatch):
    real = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).absolute() != trained and real(path, mode))
    break_writing(monkeypatch, errno.EROFS, trained)
    return trained


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_read_only_run_is_evaluated_and_left_unchanged(verb, read_only, capsys):
    before = content(read_only)
    main([verb, *LAST])
    out = capsys.readouterr().out
    assert f"{verb} finished: {'val' if verb == 'validate' else verb}/acc" in out
    assert "x may not be written: its run.json and metrics.csv are as they were\n" in out
    assert content(read_only) == before


@pytest.mark.parametrize(
    "words", [["predict", *LAST], ["sharpness", *LAST], ["shift", *LAST], [*FIT, "--overwrite"], [*FIT[:-1], "x/y"]]
)
def test_verbs_that_write_files_refuse_a_read_only_run_at_the_start(words, read_only, capsys):
    before = content(read_only)
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith(f"error: '{words[-1] if words[-1] == 'x/y' else 'x'}' may not be written, where {words[0]}")
    assert "name another folder with --run" in error
    assert error.count("\n") == 1
    assert content(read_only) == before


def test_predictions_of_a_read_only_run_can_go_to_another_folder(read_only, tmp_path):
    main(["predict", *LAST, "--ckpt_path", "x/checkpoints/last.ckpt", "--run", "mine"])
    assert (tmp_path / "mine/predictions.csv").is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_can_be_written_follows_the_permissions_of_the_folder(tmp_path):
    (tmp_path / "x").mkdir(mode=0o555)
    assert not RunFolder(tmp_path / "x/y/z").can_be_written()
    assert RunFolder(tmp_path / "y/z").can_be_written()


@pytest.mark.parametrize("names", [(), ("metrics.csv", "run.json")], ids=["everything", "metrics"])
def test_full_disk_is_the_first_error_reported(names, tmp_path, monkeypatch, capsys):
    class Full(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                break_writing(monkeypatch, errno.ENOSPC, tmp_path / "x", names)

    monkeypatch.setattr("tests.cli.test_unwritable.Full", Full, raising=False)
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--trainer.callbacks", "tests.cli.test_unwritable.Full"])
    assert stop.value.code == 1
    out = capsys.readouterr()
    first, *more = out.err.splitlines()
    assert "could not be written, as the disk is full: make room there, or name a folder on another disk" in first
    assert "run.json" not in first
    assert not names or "metrics.csv'" in first
    assert "run.json' could not be written" in more[-1]
    assert "finished" not in out.out


def test_run_json_that_cannot_be_written_at_the_end_is_an_error(tmp_path, monkeypatch, capsys):
    class Full(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            break_writing(monkeypatch, errno.ENOSPC, tmp_path / "x", ("run.json",))

    monkeypatch.setattr("tests.cli.test_unwritable.Full", Full, raising=False)
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--trainer.callbacks", "tests.cli.test_unwritable.Full"])
    assert stop.value.code == 1
    out = capsys.readouterr()
    assert out.err.startswith("error: 'x/run.json' could not be written, as the disk is full")
    assert "val/acc" in out.out


class Removing(L.Callback):
    def __init__(self, epoch: int = 1, whole: bool = True):
        self.epoch, self.whole = epoch, whole

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            folder = Path(trainer.default_root_dir)
            for path in [folder] if self.whole else folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("whole", ["true", "false"])
def test_folder_removed_during_the_run_is_an_error(whole, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--trainer.callbacks", "tests.cli.test_unwritable.Removing", "--trainer.callbacks.whole", whole])
    assert stop.value.code == 1
    out = capsys.readouterr()
    assert out.err.startswith("error: x, or its run.json, was removed while fit ran: ")
    assert out.err.count("\n") == 1
    assert "finished" not in out.out
    assert Path("x/checkpoints/last.ckpt").is_file()  # the last checkpoint is still written


def test_error_is_reported_also_where_the_folder_was_removed(trained, monkeypatch, capsys):
    class Failing(L.Callback):
        def on_test_end(self, trainer, pl_module):
            shutil.rmtree(trained)
            raise RuntimeError("first of all")

    monkeypatch.setattr("tests.cli.test_unwritable.Failing", Failing, raising=False)
    with pytest.raises(SystemExit):
        main(["test", *LAST, "--trainer.callbacks", "tests.cli.test_unwritable.Failing"])
    assert capsys.readouterr().err.startswith("error: first of all\n")
    assert not trained.exists()


def test_error_is_reported_also_where_the_earlier_run_cannot_be_restored(trained, monkeypatch, capsys):
    before = content(trained)
    real = os.replace

    class Failing(L.Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            raise ValueError("first of all")

    def broken(source, target, **options):
        if Path(source).name == "network.pt" and ".before" in Path(source).parts:
            raise OSError(errno.EIO, "second")
        real(source, target, **options)

    monkeypatch.setattr("tests.cli.test_unwritable.Failing", Failing, raising=False)
    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(SystemExit):
        main([*FIT, "--overwrite", "--trainer.callbacks", "tests.cli.test_unwritable.Failing"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: first of all"
    assert lines[-1] == (
        "error: not all files of the earlier run could be put back into x ([Errno 5] second): the others are in "
        "x/.before, move them into x before the next command there, which removes them"
    )
    assert json.loads((trained / "run.json").read_text())["outcome"] == "finished"
    aside = {
        trained / path.relative_to(trained / ".before"): text for path, text in content(trained / ".before").items()
    }
    assert trained / "network.pt" in aside
    back = {path: text for path, text in content(trained).items() if ".before" not in path.parts}
    assert {**back, **aside} == before
