"""A command that is killed before any of its file changes and started again ends like an undisturbed one."""

import os
import shutil
from pathlib import Path

import pytest

from tests.kill_anywhere import differences, killed, left_behind

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMOKE = ["--config", "_overlay/smoke", "--trainer.accelerator", "cpu", *QUIET]
FITS = {
    "KD": ["--config", "distillation/kd_digits", "--model.teacher_weights", "random"],
    "ELR+": ["--config", "noisy_labels/elr_plus_digits"],
    "EMA": ["--config", "flatness/ema_digits"],
    "pool": ["--config", "active_learning/lfosa_digits"],
    "several labels": ["--config", "multi_label/baseline_arrays", "--data.fake", "true", "--data.path", "none.npz"],
}
MEMORY_DISK = Path("/dev/shm")
HAS_MEMORY_DISK = MEMORY_DISK.is_dir() and os.access(MEMORY_DISK, os.W_OK)


@pytest.fixture(params=["the same disk", pytest.param("another disk", marks=pytest.mark.slow)])
def tmpdir(request, tmp_path):
    """The folder that ``$TMPDIR`` names."""
    if request.param == "the same disk":
        yield tmp_path / "tmp"
        return
    if not HAS_MEMORY_DISK or MEMORY_DISK.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    folder = MEMORY_DISK / f"lightning-kd-tests-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def check_points(tmp_path, tmpdir, first, again, points, without=()):
    """Kill ``first(run)`` before ``points`` of its file changes, all for ``None``, and run ``again(run)``; the run
    must then have the files of an undisturbed one."""
    count = killed(first("whole"), tmp_path, "whole", tmpdir)
    whole = left_behind(tmp_path / "whole", without)
    assert not any(name.endswith((".part", ".lock")) for name in whole), list(whole)
    chosen = range(count) if points is None else sorted({round(k * (count - 1) / (points - 1)) for k in range(points)})
    for point in chosen:
        run = f"r{point}"
        assert killed(first(run), tmp_path, run, tmpdir, point) is None
        killed(again(run, tmp_path), tmp_path, run, tmpdir)
        differ = differences(left_behind(tmp_path / run, without), whole)
        assert not differ, f"killed before change {point} of {count}"
        assert not list(tmpdir.iterdir())
        shutil.rmtree(tmp_path / run)


def check_fit(tmp_path, tmpdir, method, points):
    def words(run):
        return ["fit", *FITS[method], *SMOKE, "--run", run]

    def again(run, folder):
        on = (folder / run / "checkpoints/last.ckpt").is_file()
        return [*words(run), *(["--ckpt_path", "last"] if on else [])]

    check_points(tmp_path, tmpdir, words, again, points)


def check_active(tmp_path, tmpdir, points):
    def words(run):
        return ["active", "--config", "active_learning/entropy_digits", *SMOKE, "--data.rounds", "1", "--run", run]

    check_points(tmp_path, tmpdir, words, lambda run, folder: words(run), points)


def check_label(tmp_path, tmpdir, points):
    fit = ["fit", *FITS["pool"], *SMOKE, "--run", "asked"]
    killed(fit, tmp_path, "asked", tmpdir)
    killed(["query", "--config", "asked/config.yaml", *QUIET], tmp_path, "asked", tmpdir)
    (query,) = (tmp_path / "asked").glob("query_*.csv")
    header, *rows = query.read_text().splitlines()
    place = header.split(",").index("label")
    answers = [row.split(",") for row in rows]
    for row in answers:
        row[place] = "unknown"
    query.write_text("\n".join([header, *map(",".join, answers)]) + "\n")

    def words(run):
        if not (tmp_path / run).is_dir():
            shutil.copytree(tmp_path / "asked", tmp_path / run)
        return ["label", f"{run}/{query.name}"]

    check_points(tmp_path, tmpdir, words, lambda run, folder: words(run), points)


def test_fit_killed_before_four_file_changes_ends_like_an_undisturbed_one(tmp_path, tmpdir):
    check_fit(tmp_path, tmpdir, "ELR+", 4)


def test_label_killed_before_three_file_changes_ends_like_an_undisturbed_one(tmp_path):
    check_label(tmp_path, tmp_path / "tmp", 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", FITS)
def test_fit_killed_before_every_file_change_ends_like_an_undisturbed_one(tmp_path, tmpdir, method):
    check_fit(tmp_path, tmpdir, method, None)


@pytest.mark.slow
def test_active_killed_before_25_file_changes_ends_like_an_undisturbed_one(tmp_path, tmpdir):
    check_active(tmp_path, tmpdir, 25)  # of about 150


@pytest.mark.slow
def test_label_killed_before_every_file_change_ends_like_an_undisturbed_one(tmp_path, tmpdir):
    check_label(tmp_path, tmpdir, None)
