"""The last lines of a command: its results, its folder, and the next command."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning_kd
from lightning_kd.cli.command_words import resume_command
from lightning_kd.cli.run_trainer import verb_module
from lightning_kd.cli.usage import OWN_VERBS
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.file_writing import sentence_of, write_text

__all__ = ["check_still_there", "report", "tell"]


def check_still_there(cli: Any) -> None:
    """Raise a ``FileNotFoundError`` if the run folder, or its ``run.json``, was removed during the command."""
    folder = cli.run_folder
    if cli.beginning.has_begun() and not folder.record_file.is_file():
        raise FileNotFoundError(
            f"{folder.path}, or its run.json, was removed while {cli.subcommand} ran: only what was written since then "
            "is there; run the command again, if needed with another --run folder"
        )


def report(cli: Any, error: BaseException | None) -> None:
    """Write the outcome of the ``RunCLI`` to ``run.json`` and print the last lines.

    If the command failed before its work began, its folder is restored. If ``run.json`` cannot be written, that is
    reported after the first error, or is the error if there is no other.
    """
    folder, trainer = cli.run_folder, getattr(cli, "trainer", None)
    outcome = "finished" if error is None else "interrupted" if _is_stop(error) else "failed"
    begun = cli.beginning.has_begun()
    unwritten: list[str] = []
    if error is not None and not begun:
        with _errors_kept(unwritten):
            cli.beginning.before.restore()
    elif not begun and not cli.only_prints:
        cli.beginning.begin(folder)
        begun = True
    metrics = {} if trainer is None else {k: float(v) for k, v in trainer.callback_metrics.items()}
    epochs = 0 if trainer is None else trainer.current_epoch
    details: dict[str, Any] = {"metrics": metrics}
    if cli.subcommand == "active":  # the epochs are those of each round
        details["rounds"] = len(list(folder.path.glob("round_[0-9]*")))
    else:
        details["epochs"] = epochs
    if error is not None and outcome == "failed":
        sentence = _sentence(error)
        details["error"] = f"{type(_cause(error)).__name__}: {sentence}"
        inside = begun and folder.record_file.is_file()
        _print_error(error, folder.path / "traceback.txt" if inside else None)
    if begun and (error is None or folder.record_file.is_file()):
        with _errors_kept(unwritten):
            folder.end(outcome, **details)
    for sentence in unwritten:
        print(f"error: {sentence}", file=sys.stderr)
    if outcome == "failed" and not begun:
        return
    reached = [f"{cli.subcommand} {outcome}"]
    if cli.subcommand == "fit" and error is None and not metrics:
        reached.append("with nothing left to train, as --trainer.max_epochs is reached,")
    if cli.subcommand == "fit":
        reached.append(f"after {epochs} epoch{'' if epochs == 1 else 's'}")
    shown = [f"{k} {v:.4g}" for k, v in sorted(metrics.items()) if k.startswith(("val/", "test/"))]
    print(f"\n{' '.join(reached)}{': ' if shown else ''}{', '.join(shown)}")
    if cli.only_prints and error is None:
        print(f"{folder.path} may not be written: its run.json and metrics.csv are as they were")
    if begun:
        file, page = folder.path / "predictions.csv", folder.path / "predictions.html"
        if cli.subcommand == "predict" and file.is_file():
            print(f"in {file}")
            if page.is_file():
                print(f"to look at: {page}")
        else:
            print(f"in {folder.path}/")
    if step := _next_step(cli) if outcome == "finished" else _resume_step(cli, outcome, begun):
        print(step)
    if unwritten and error is None:
        sys.exit(1)


def tell(cli: Any, error: BaseException) -> None:
    """Print the last lines of a failed or stopped ``RunCLI`` without a record: ``teach``, ``fast_dev_run``."""
    if not hasattr(cli, "run_folder") or cli.subcommand is None:
        return
    if not _is_stop(error):
        _print_error(error, None)
    elif not cli.keeps_run:
        print(f"\n{cli.subcommand} interrupted\ngo on with: {cli.command}")


def _print_error(error: BaseException, trace: Path | None) -> None:
    print(f"error: {_sentence(error)}{_write_trace(error, trace)}", file=sys.stderr)
    error.told = True  # type: ignore[attr-defined]


@contextmanager
def _errors_kept(sentences: list[str]) -> Iterator[None]:
    """A context that adds the message of an ``OSError`` to ``sentences`` instead of raising it."""
    try:
        yield
    except OSError as error:
        sentences.append(str(error))


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, (KeyboardInterrupt, SystemExit))


def _cause(error: BaseException) -> BaseException:
    """The first error: jsonargparse wraps the error that a constructor raised."""
    while error.__cause__ is not None and str(error).startswith("Does not validate"):
        error = error.__cause__
    return error


def _sentence(error: BaseException) -> str:
    cause = sentence_of(_cause(error))
    if _cause(error) is not error and cause.startswith("Expected a "):  # the error of the last of several types
        tried = re.findall(r"^\s*- (?!Expected a|Does not validate)(.+)$", str(error), re.MULTILINE)
        return tried[-1] if tried else cause
    return cause


def _write_trace(error: BaseException, path: Path | None) -> str:
    """Write the traceback and return the words that say where; without ``path``, only for errors of other packages."""
    if path is None:
        ours = Path(lightning_kd.__file__).parent
        if ours in Path(traceback.extract_tb(_cause(error).__traceback__)[-1].filename).parents:
            return ""
        path = Path(tempfile.gettempdir()) / f"lightning-kd-{uuid4().hex[:12]}.txt"
    try:
        write_text(path, "".join(traceback.format_exception(error)))
    except OSError:  # the error itself is printed without the traceback
        return ""
    return f"\n(trace in {path})"


def _next_step(cli: Any) -> str:
    folder = cli.run_folder
    config = shlex.quote(f"{folder.path}/config.yaml")
    step = ""
    if cli.subcommand in OWN_VERBS:
        next_step = getattr(verb_module(cli.subcommand), "next_step", None)
        step = next_step(config, cli.trainer.answer) if next_step else ""
    elif cli.subcommand == "fit" and folder.last.is_file():
        pool = getattr(cli.datamodule, "pool_path", None) is not None
        step = f"lightning-kd {f'query --config {config}' if pool else f'test --config {config} --ckpt_path last'}"
    elif cli.subcommand in ("test", "validate") and _others_beside(folder):
        step = f"lightning-kd compare {shlex.quote(str(folder.path.parent))}"
    return step and f"next: {step}"


def _others_beside(folder: RunFolder) -> bool:
    """Whether this run is finished, and other finished runs are in the same parent folder."""
    runs = [path.parent for path in folder.path.absolute().parent.glob("*/run.json") if _is_finished_fit(path)]
    return folder.path.absolute() in runs and len(runs) > 1


def _is_finished_fit(record_file: Path) -> bool:
    return RunFolder(record_file.parent).fit_is_finished() and (record_file.parent / "config.yaml").is_file()


def _resume_step(cli: Any, outcome: str, begun: bool) -> str:
    """The line with the command that resumes a stopped or failed one; empty if it would fail again."""
    if cli.subcommand == "active" and (begun or outcome == "interrupted"):
        return f"go on with: {resume_command(cli.command, None)}"
    if cli.subcommand == "fit" and begun and cli.run_folder.last.is_file():
        return f"go on with: {resume_command(cli.command)}"
    return f"go on with: {cli.command}" if outcome == "interrupted" else ""
