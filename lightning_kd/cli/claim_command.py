"""``lightning-kd claim``: run a small experiment on a paper's claim, and report whether the claim holds in it."""

from __future__ import annotations

import argparse
import difflib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from lightning_kd.argument_checks import check_numbers
from lightning_kd.claims.claim_file import Claim, read_claim, seeds_of
from lightning_kd.claims.kept_runs import commands_left
from lightning_kd.claims.progress import Progress
from lightning_kd.claims.results import read_results, to_json, to_markdown, to_png
from lightning_kd.claims.run_processes import Job, run_jobs
from lightning_kd.cli import main as run_command
from lightning_kd.cli.config_names import config_folder, config_path
from lightning_kd.cli.signals import stopped_by_signals
from lightning_kd.file_writing import alone, write_text, written_whole

__all__ = ["claim_list", "find_claim", "main"]

_QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
_PRELOAD = ["lightning_kd.cli.run_cli"]


def main(args: Sequence[str]) -> None:
    """Run the command with ``args``.

    Raises:
        ValueError: if the claim or an option cannot be used, or a run failed.
        OSError: if there is no such claim, or files cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-kd claim",
        usage="lightning-kd claim [NAME] [--seeds N [N ...]] [--jobs N] [--run FOLDER] [--overwrite] [further options]",
        description="Run a small experiment on a paper's claim, and report whether the claim holds in it. Without "
        "NAME, or with list: list the claims. Further options, such as --data.root FOLDER, go to every training.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", default="list", metavar="NAME", help="a shipped claim, or a YAML file")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="number of seeds, or a list of seeds (default: the claim's)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of runs at once, of one thread each (default: 1)"
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="folder of the runs (default: runs/claims/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="run everything again, also finished runs")
    given, further = parser.parse_known_args(list(args))
    if given.name == "list":
        if further:
            raise ValueError(f"claim list takes no options, got {shlex.join(further)}: name a claim")
        print(claim_list())
        return
    check_numbers(least=1, whole=True, jobs=given.jobs)
    claim = read_claim(find_claim(given.name))
    if given.seeds is not None:
        claim = replace(claim, seeds=seeds_of(given.seeds[0] if len(given.seeds) == 1 else given.seeds))
    folder = given.run or Path("runs/claims") / claim.name
    refusal = f"another claim works in {folder}: wait until it has ended, or name another --run folder"
    with stopped_by_signals(), alone(folder / ".claim.lock", refusal):
        try:
            _make_runs(claim, folder, given.jobs, given.overwrite, further)
        except (KeyboardInterrupt, SystemExit):
            words = [word for word in args if word != "--overwrite"]
            print(f"stopped; go on with: {shlex.join(['lightning-kd', 'claim', *words])}", file=sys.stderr)
            raise
        _tell(claim, folder)


def claim_list() -> str:
    """The text of ``lightning-kd claim list``: name, minutes, sentence and source of each shipped claim."""
    lines = ["lightning-kd claim NAME runs one of these; minutes are of one CPU thread:"]
    for path in sorted((config_folder() / "claims").glob("*.yaml")):
        claim = read_claim(path)
        lines.append(f"  {claim.name:<14} {claim.minutes:>3g} min  {claim.sentence} ({claim.source})")
    return "\n".join(lines)


def find_claim(name: str) -> Path:
    """The file of a shipped claim by its name, or of your own claim by its path.

    Raises:
        FileNotFoundError: if there is none, with the nearest name.
    """
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    names = sorted(path.stem for path in (config_folder() / "claims").glob("*.yaml"))
    if name in names:
        return config_folder() / "claims" / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise FileNotFoundError(f"there is no claim {name!r}: {hint}`lightning-kd claim list` shows all {len(names)}")


def _make_runs(claim: Claim, folder: Path, at_once: int, anew: bool, further: Sequence[str]) -> None:
    """Make all runs that are not finished, after checking the commands of all."""
    further = [*further, *_QUIET]
    jobs: list[Job] = []
    settings: dict[str, str] = {}
    for seed in claim.seeds:
        for setting in claim.settings:
            name = claim.run_name(setting, seed)
            commands = claim.commands(setting, seed, folder, further)
            for flag, value in pairwise(commands[0]):
                if flag == "--config":
                    config_path(value)  # raises if there is no such config
            if left := commands_left(folder / name, commands, anew):
                after = [claim.run_name(other, seed) for other in claim.needs(setting)]
                jobs.append(Job(name, left, folder / "logs" / f"{name}.txt", after))
                settings[name] = setting
    if not jobs:
        return
    _check(claim, jobs, settings, folder, at_once)
    total = len(claim.seeds) * len(claim.settings)
    guess = 60 * claim.minutes / total
    with Progress(claim.name, list(settings.values()), at_once, guess) as progress:

        def ended(job: Job, seconds: float) -> None:
            progress.ended(settings[job.name], seconds, f"{job.name}: {seconds:.0f} s")

        try:
            run_jobs(jobs, at_once, run_command, ended, _PRELOAD)
        except RuntimeError as error:
            raise ValueError(f"{error}; the runs that are done are kept") from None


def _check(claim: Claim, jobs: Sequence[Job], settings: dict[str, str], folder: Path, at_once: int) -> None:
    """Parse the training command of each setting, in other processes, as this one imports neither torch nor lightning.

    Raises:
        ValueError: if one cannot be parsed.
    """
    first = {settings[job.name]: job for job in reversed(jobs) if job.commands[0][0] in ("fit", "active")}
    checks = [
        Job(
            f"the command of {setting}",
            [[*job.commands[0], "--print_config"]],
            folder / "logs" / f"check_{setting}.txt",
        )
        for setting, job in first.items()
    ]
    try:
        run_jobs(checks, at_once, _parse, preload=_PRELOAD)
    except RuntimeError as error:
        raise ValueError(f"{claim.name}: nothing was run, as {error}") from None


def _parse(words: list[str]) -> None:
    try:
        run_command(words)
    except SystemExit as error:  # --print_config exits with 0 if all is well
        if error.code:
            raise


def _tell(claim: Claim, folder: Path) -> None:
    """Print the verdicts, and write ``claim.md``, ``claim.json`` and ``claim.png``."""
    results = read_results(claim, claim.seeds, folder)
    text = to_markdown(results)
    print(text)
    write_text(folder / "claim.md", text)
    write_text(folder / "claim.json", json.dumps(to_json(results), indent=2) + "\n")
    with written_whole(folder / "claim.png") as part:
        part.write_bytes(to_png(results))
    for suffix in ("md", "json", "png"):
        print(folder / f"claim.{suffix}")
