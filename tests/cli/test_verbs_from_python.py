"""The verbs of the command line as methods of the Trainer that ``get_cli`` makes."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from lightning_kd.cli import get_cli, main
from lightning_kd.cli.run_trainer import RunTrainer, verb_module
from lightning_kd.cli.usage import OWN_VERBS

QUIET = ["--trainer.enable_progress_bar", "false"]
SMOKE = ["--config", "_overlay/smoke", *QUIET, "--run", "r"]
FLAT = ["--config", "flatness/sgd_digits", *SMOKE]
POOL = ["--config", "active_learning/entropy_digits", *QUIET, "--trainer.max_epochs", "1", "--run", "r"]


def test_shift_and_sharpness_from_python_write_their_files():
    cli = get_cli(FLAT)
    with pytest.raises(FileNotFoundError, match=r"there is no r/checkpoints/last\.ckpt"):
        cli.trainer.shift(cli.model, cli.datamodule)
    main(["fit", *FLAT])
    path = cli.trainer.shift(cli.model, cli.datamodule, ckpt_path="last", samples=20, guard=None)
    assert path == Path("r/checkpoints/shifted.ckpt")
    report = json.loads(Path("r/shift.json").read_text())
    assert torch.load(path, weights_only=True)["optimum_shifting"] == report
    assert report["samples"] == 20
    cli = get_cli(FLAT)
    cli.trainer.sharpness(cli.model, cli.datamodule, ckpt_path=str(path), samples=30, slices="none", max_probes=3)
    (entry,) = json.loads(Path("r/sharpness.json").read_text())
    assert entry["checkpoint"] == str(path)


def test_shift_from_python_equals_the_command():
    main(["fit", *FLAT])
    cli = get_cli(FLAT)
    path = cli.trainer.shift(cli.model, cli.datamodule, samples=20, guard=None)
    main(["shift", "--run", "r", "--samples", "20", "--guard", "null", "--output", "r/by_command.ckpt", *QUIET])
    ours, theirs = (torch.load(p, weights_only=True)["state_dict"] for p in (path, "r/by_command.ckpt"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_query_from_python_writes_once_and_needs_a_pool_method():
    main(["fit", *POOL])
    cli = get_cli(POOL)
    path = cli.trainer.query(cli.model, cli.datamodule)
    assert path == Path("r/query_00.csv")
    assert len(path.read_text().splitlines()) == 41
    cli = get_cli(POOL)
    with pytest.raises(ValueError, match="wait for an answer"):
        cli.trainer.query(cli.model, cli.datamodule)
    cli = get_cli(FLAT)
    with pytest.raises(ValueError, match="query needs a method for pools"):
        cli.trainer.query(cli.model, cli.datamodule)


def test_active_from_python_raises_and_names_run_rounds():
    cli = get_cli(POOL)
    with pytest.raises(RuntimeError, match="run_rounds"):
        cli.trainer.active(cli.model, cli.datamodule)


def test_each_verb_is_a_method_with_the_options_of_its_function():
    for name in OWN_VERBS:
        assert inspect.signature(getattr(RunTrainer, name)) == inspect.signature(getattr(verb_module(name), name))
        assert getattr(RunTrainer, name).__doc__
