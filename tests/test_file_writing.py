"""Files are written whole or not at all: leftovers of killed processes, links, locks, and errors of the disk."""

import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_kd import file_writing
from lightning_kd.data.array_files import write_npz
from lightning_kd.file_writing import open_lock, remove_leftovers, sentence_of, write_text, written_whole
from lightning_kd.pool.pool_record import alone
from tests.forked import run_forked

LEFTOVER = ".metrics.csv.0123456789abcdef0123456789abcdef.part"


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def die_while_writing(folder):
    with written_whole(Path(folder) / "some.csv") as part:
        part.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_leftovers_of_a_killed_process_are_removed_by_the_next_write(tmp_path):
    assert run_forked(die_while_writing, tmp_path, folder=tmp_path).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    (tmp_path / LEFTOVER).write_text("half")
    foreign = [".mine.part", "mine.0123456789abcdef0123456789abcdef.part", ".a.0123.part", "b.partial"]
    for name in foreign:
        (tmp_path / name).write_text("")
    write_text(tmp_path / "other.csv", "whole")
    assert names(tmp_path) == sorted([*foreign, "other.csv"])


def test_a_part_that_is_still_being_written_is_not_removed(tmp_path):
    with written_whole(tmp_path / "one.csv") as part:
        part.write_text("one")
        write_text(tmp_path / "two.csv", "two")
        remove_leftovers(tmp_path)
        assert part.exists()
    assert names(tmp_path) == ["one.csv", "two.csv"]
    assert (tmp_path / "one.csv").read_text() == "one"


def test_symbolic_links_are_not_followed(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "run" / LEFTOVER).symlink_to(tmp_path / "theirs")
    monkeypatch.setattr("lightning_kd.file_writing.uuid4", lambda: type("One", (), {"hex": LEFTOVER.split(".")[3]}))
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "run" / "metrics.csv", "text")
    (tmp_path / "run" / ".pool.lock").symlink_to(tmp_path / "theirs")
    with (
        pytest.raises(ValueError, match=r"\.pool\.lock is a symbolic link, which is not followed: remove it"),
        alone(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "theirs").read_text() == "precious"
    (tmp_path / "lock").write_text("some")
    os.close(open_lock(tmp_path / "lock"))
    assert (tmp_path / "lock").read_text() == "some"


def test_a_new_file_has_the_usual_permissions(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "could not be written, as the disk is full: make room there"),
        (errno.EROFS, "could not be written, as its folder may not be written: change its permissions"),
        (errno.EACCES, "could not be written, as its folder may not be written: change its permissions"),
    ],
)
def test_error_of_a_failed_write_names_the_file_and_the_first_cause(tmp_path, monkeypatch, number, sentence):
    def broken(path, *args, **kwargs):
        raise OSError(errno.EIO, "second error", str(path))

    monkeypatch.setattr(Path, "unlink", broken)
    with (
        pytest.raises(OSError, match=f"{tmp_path}/some.csv' {sentence}") as caught,
        written_whole(tmp_path / "some.csv"),
    ):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert "second" not in str(caught.value)
    assert type(caught.value) is type(OSError(number, ""))
    with pytest.raises(FileNotFoundError, match="of another kind"), written_whole(tmp_path / "some.csv"):
        raise FileNotFoundError("of another kind")
    with pytest.raises(PermissionError, match="elsewhere/x"), written_whole(tmp_path / "some.csv"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/x")


def test_sentence_of_explains_a_full_disk_and_keeps_other_errors():
    full = "could not be written, as the disk is full: make room there, or name a folder on another disk"
    assert (
        sentence_of(OSError(errno.ENOSPC, "No space left", "/tmp/x", None, "run/last.ckpt"))
        == f"'run/last.ckpt' {full}"
    )
    assert sentence_of(OSError(errno.ENOSPC, "No space left")) == f"a file {full}"
    assert sentence_of(OSError(errno.EACCES, "Permission denied", "x")) == "[Errno 13] Permission denied: 'x'"
    assert sentence_of(ValueError("plain")) == "plain"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
def test_a_full_disk_raises_for_text_arrays_and_tensors_and_leaves_no_file(tmp_path, monkeypatch):
    def full(path):
        real = part_of(path)
        real[0].unlink()
        real[0].symlink_to("/dev/full")
        return real

    from lightning_kd import file_writing

    part_of = file_writing._new_part
    monkeypatch.setattr(file_writing, "_new_part", full)
    with pytest.raises(OSError, match=r"a\.txt' could not be written, as the disk is full"):
        write_text(tmp_path / "a.txt", "some")
    with pytest.raises(OSError, match=r"b\.npz' could not be written, as the disk is full"):
        write_npz(tmp_path / "b.npz", {"x": np.zeros(100_000)})
    with pytest.raises(OSError, match=r"c\.pt' could not be written"), written_whole(tmp_path / "c.pt") as part:
        torch.save({"x": torch.zeros(100_000)}, part)
    assert names(tmp_path) == []


def test_alone_works_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_writing.fcntl, "flock", unsupported)
    with file_writing.alone(tmp_path / "new" / ".lock", "no"):
        assert (tmp_path / "new").is_dir()
    assert not list((tmp_path / "new").iterdir())
