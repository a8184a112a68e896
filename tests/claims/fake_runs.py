"""Fake runs: they leave the files of a command in its folder at once, without a training."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_kd.claims.run_processes import Job

CLAIM = """
# two settings and a teacher, for tests
claim: The second way is better.
source: Somebody, 2020
minutes: 1
seeds: 3
metric: test/acc
settings:
  teacher: fit --config distillation/teacher_digits
  plain:
    - fit --config distillation/student_digits
    - test --ckpt_path last
  taught:
    - fit --config distillation/kd_digits --model.teacher_weights {teacher}/network.pt
    - test --ckpt_path last
expected:
  - taught > plain
"""


def value_of(run: Path) -> float:
    """The test accuracy of a fake run: 0.5 and a little for the seed, and 0.1 more for ``taught``."""
    seed = int(run.name.rpartition("_seed")[2])
    return 0.5 + 0.01 * seed + (0.1 + 0.001 * seed) * run.name.startswith("taught")


def fake_command(words: list[str]) -> None:
    """Leaves the files of ``lightning-kd WORDS``, or fails for the run that a file ``fail`` names."""
    if "--print_config" in words:
        raise SystemExit(0)
    verb, run = words[0], Path(words[words.index("--run") + 1])
    if (run.parent / "fail").is_file() and run.name == (run.parent / "fail").read_text():
        print("error: it diverged", file=sys.stderr)
        raise SystemExit(1)
    teacher = [word for word in words if word.endswith("network.pt")]
    assert all(Path(path).is_file() for path in teacher), "the teacher comes first"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    file = run / "run.json"
    earlier = json.loads(file.read_text()) if file.is_file() else None
    history = [*earlier.pop("history"), earlier] if earlier else []
    record = {"verb": verb, "command": shlex.join(["lightning-kd", *words]), "versions": {"torch": "2.6.0"}}
    file.write_text(json.dumps({**record, "outcome": "finished", "history": history}))
    (run / "config.yaml").write_text("seed_everything: 0\n")
    (run / "network.pt").touch()
    (run / "checkpoints/last.ckpt").touch()
    lines = ["epoch,step,val/acc,test/acc", "0,1,0.4,"]
    lines += [f"1,2,,{value_of(run)}"] if verb == "test" else []
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")


class FakeRunner:
    """Replaces ``run_jobs``: runs fake commands in this process, and keeps their words in ``done``."""

    def __init__(self) -> None:
        self.done: list[list[str]] = []

    def __call__(
        self,
        jobs: Sequence[Job],
        at_once: int,
        call: Callable[[list[str]], None],
        ended: Callable[[Job, float], None] = lambda job, seconds: None,
        preload: Sequence[str] = (),
    ) -> None:
        for job in jobs:
            for words in job.commands:
                if "--print_config" in words:
                    continue
                self.done.append(words)
                try:
                    fake_command(words)
                except SystemExit as error:
                    raise RuntimeError(f"{job.name} failed: it diverged") from error
            ended(job, 1.0)
