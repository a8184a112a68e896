"""The door: ``lightning-kd fit | validate | test | predict | shift | sharpness | query | label | active | ...``.

Only light modules are imported before the verb is known: ``compare``, ``label`` and ``--version`` start at once.
"""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kd import __version__
from lightning_kd.configs_by_name import config_folder, config_names, with_config_paths

if TYPE_CHECKING:
    from lightning_kd.trainer_cli import RunCLI

__all__ = ["get_cli", "main"]

USAGE = """usage: lightning-kd VERB [--config NAME_OR_PATH ...] [--run FOLDER] [options]

  fit       train from a config:     lightning-kd fit --config distillation/dhkd_digits
  validate  evaluate on the validation split, test on the test split, with --ckpt_path last | best | PATH
  test
  predict   write predictions.csv into the run folder
  shift     optimum shifting of a finished checkpoint:  lightning-kd shift --ckpt_path RUN/checkpoints/last.ckpt
  sharpness how flat it is: table and pictures:         lightning-kd sharpness --ckpt_path RUN/checkpoints/last.ckpt
  query     what to label next, from a pool: query_ROUND.csv in the run folder
  label     take the answers in:     lightning-kd label FOLDER/query_00.csv
  active    a whole active learning benchmark with an oracle: lightning-kd active --config active_learning/lfosa_digits
  list      methods, optimizers, callbacks, data modules, networks and shipped configs
  compare   mean and std over seeds of finished runs: lightning-kd compare RUN...

  lightning-kd fit --help            all options; --model.help DHKD and --data.help CIFAR100DataModule those of a class
  lightning-kd fit --print_config    the configuration as it would run
  lightning-kd --version
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; ``args`` default to the process's own.

    Raises:
        SystemExit: with status 1 (or jsonargparse's 2) where the command failed; what failed was printed.
    """
    argv = list(sys.argv[1:] if args is None else args)
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        print(USAGE)
    elif verb == "--version":
        print(f"lightning-kd {__version__}")
    elif verb in ("compare", "label"):
        light = importlib.import_module(f"lightning_kd.{'compare' if verb == 'compare' else 'pool.label_command'}")
        try:
            light.main(argv[1:])
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
    elif verb == "list":
        print(_listing())
    else:
        _run(argv)


def get_cli(args: Sequence[str] | None = None, run: bool = False, **kwargs: Any) -> RunCLI:
    """The parsed command line as objects ``cli.model``, ``cli.datamodule`` and ``cli.trainer``, for notebooks.

    Args:
        args: options such as ``["--config", "distillation/dhkd_digits", "--trainer.max_epochs", "3"]``; with
            ``run=True`` the verb comes first.
        run: run the verb at once.
        kwargs: further arguments of ``RunCLI``.
    """
    from lightning_kd.trainer_cli import RunCLI

    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")  # a notebook's sys.argv is not ours
    resolved, paths = with_config_paths(list(args or []))
    command = shlex.join(["lightning-kd", *(args or [])])
    return RunCLI(args=resolved, run=run, config_paths=paths, command=command, **kwargs)


def _run(argv: list[str]) -> None:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own classes, as with python -m
    try:
        resolved, paths = with_config_paths(with_config_of_run(argv))
        from lightning_kd.trainer_cli import RunCLI, quiet

        quiet()
        RunCLI(args=resolved, run=True, config_paths=paths, command=shlex.join(["lightning-kd", *argv]))
    except Exception as error:
        if not getattr(error, "told", False):
            if not isinstance(error, (ValueError, OSError, TypeError, ImportError)):
                raise
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _listing() -> str:
    import lightning as L
    from torch.optim import Optimizer

    import lightning_kd.callbacks
    import lightning_kd.core
    import lightning_kd.data
    from lightning_kd.core.registry import family_packages
    from lightning_kd.core.task import Task
    from lightning_kd.nets import network_names

    def classes(packages: list[Any], base: type) -> list[str]:
        named = {name: getattr(package, name) for package in packages for name in package.__all__}
        return [
            f"  {name:<26} {(inspect.getdoc(value) or '').partition(chr(10))[0]}"
            for name, value in sorted(named.items())
            if inspect.isclass(value)
            and issubclass(value, base)
            and not name.endswith("Task")  # bases
            and not inspect.isabstract(value)
        ]

    lines = ["methods:", *classes([lightning_kd.core, *family_packages()], Task)]
    lines += ["optimizers:", *classes(family_packages(), Optimizer)]
    lines += ["callbacks:", *classes([lightning_kd.callbacks, *family_packages()], L.Callback)]
    lines += ["data modules:", *classes([lightning_kd.data], L.LightningDataModule)]
    lines += ["networks:", f"  {', '.join(network_names())}", "  timm/NAME, torchvision/NAME", "configs:"]
    for name in config_names():
        first = (config_folder() / f"{name}.yaml").read_text().partition("\n")[0]
        lines.append(f"  {name:<48} {first.lstrip('# ') if first.startswith('#') else ''}")
    return "\n".join(lines)


def with_config_of_run(argv: list[str]) -> list[str]:
    """``argv`` with the ``config.yaml`` of the run, where ``shift`` or ``sharpness`` is given a checkpoint alone."""
    if argv[0] not in ("shift", "sharpness"):
        return argv
    given = {word.partition("=")[0] for word in argv}
    if given & {"--config", "-c", "--help", "-h"} or not given & {"--ckpt_path", "--run"}:
        return argv

    def value(name: str) -> str:
        for word, following in zip(argv, [*argv[1:], ""], strict=True):
            if word.partition("=")[0] == name:
                return word.partition("=")[2] or following
        return ""

    ckpt_path = value("--ckpt_path")
    run = Path(value("--run")) if ckpt_path in ("", "last", "best") else Path(ckpt_path).parent.parent
    config = run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{argv[0]} needs the config of the checkpoint's run, and there is no {config}: add --config")
    return [argv[0], "--config", str(config), *argv[1:]]


def default_run_folder(config_paths: Sequence[str], fallback: str) -> str:
    """``runs/`` and the names of the configs, overlays left out; a run's own ``config.yaml`` means that run."""
    paths = [Path(p) for p in config_paths if Path(p).parent.name != "_overlay"]
    if paths and paths[0].name == "config.yaml" and (paths[0].parent / "run.json").is_file():
        return str(paths[0].parent)
    names = [path.stem for path in paths]
    return str(Path("runs") / ("-".join(names) or fallback))
