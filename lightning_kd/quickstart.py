"""``make quickstart``: a teacher, a student alone and the same student distilled, on scikit-learn's digits.

Every step is a ``lightning-kd`` command, printed as it runs; finished steps are kept, so that it can be run again.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_kd.cli import main

SEEDS = (0, 1, 2)
FOLDER = Path("runs/quickstart")
BRIEF = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def commands(folder: Path = FOLDER, seeds: Sequence[int] = SEEDS, extra: Sequence[str] = ()) -> list[list[str]]:
    """The commands in order: per seed a teacher, the student alone, the student with DHKD, each trained and tested."""
    steps = []
    for seed in seeds:
        teacher = folder / f"teacher_seed{seed}"
        for name, config, options in (
            ("teacher", "teacher_digits", []),
            ("student_alone", "student_digits", []),
            ("student_dhkd", "dhkd_digits", ["--model.teacher_weights", str(teacher / "network.pt")]),
        ):
            run = folder / f"{name}_seed{seed}"
            shared = ["--config", f"distillation/{config}", "--seed_everything", str(seed), "--run", str(run)]
            steps.append(["fit", *shared, *options, *extra])
            steps.append(["test", *shared, *options, "--ckpt_path", "last", *extra])
    return steps


def quickstart(folder: Path = FOLDER, seeds: Sequence[int] = SEEDS, extra: Sequence[str] = ()) -> None:
    """Run what is not finished yet, then compare."""
    start = time.time()
    for command in commands(folder, seeds, extra):
        run = Path(command[command.index("--run") + 1])
        if _finished(run, command[0]):
            continue
        again = ["--overwrite"] if command[0] == "fit" else []
        print(f"\n$ lightning-kd {shlex.join(command)}")
        main([*command, *BRIEF, *again])
    print()
    runs = [str(folder / f"{name}_seed{s}") for name in ("teacher", "student_alone", "student_dhkd") for s in seeds]
    main(["compare", *runs, "--output", str(folder / "compare")])
    print(f"{time.time() - start:.0f} s in all")


def _finished(run: Path, verb: str) -> bool:
    file = run / "run.json"
    if not file.is_file():
        return False
    record = json.loads(file.read_text())
    entries = [*record["history"], record]
    last_fit = max((i for i, entry in enumerate(entries) if entry["verb"] == "fit"), default=0)
    return any(entry["verb"] == verb and entry["outcome"] == "finished" for entry in entries[last_fit:])


if __name__ == "__main__":
    quickstart()
