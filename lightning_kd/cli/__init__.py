"""The command line: ``lightning-kd fit | validate | test | predict | export | query | label | active | ...``.

Only light modules are imported before the verb is known, so that ``compare``, ``label``, ``list`` and ``--version``
start fast.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_kd import __version__
from lightning_kd.cli.command_words import with_config_of_run
from lightning_kd.cli.config_names import with_config_paths
from lightning_kd.cli.signals import stopped_by_signals
from lightning_kd.cli.usage import VERBS, usage

if TYPE_CHECKING:
    from lightning_kd.cli.run_cli import RunCLI

__all__ = ["get_cli", "main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the words of the command line after ``lightning-kd``. Default: those of the process.

    Raises:
        SystemExit: with status 1 (or jsonargparse's 2) if the command failed, after printing the error; with 143 and
            129 if SIGTERM and SIGHUP have stopped it.
    """
    argv = list(sys.argv[1:] if args is None else args)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"lightning-kd {__version__}")
    elif name in VERBS and (VERBS[name].light or VERBS[name].standalone):
        try:
            importlib.import_module(VERBS[name].module).main(argv[1:])
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
    elif name in VERBS or name.startswith("-"):
        _run(argv)
    else:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        print(f"error: there is no verb {name!r}: {hint}", file=sys.stderr)
        sys.exit(2)


def get_cli(args: Sequence[str] | None = None, run: bool = False, **kwargs: Any) -> RunCLI:
    """Build the objects of a command line: ``cli.model``, ``cli.datamodule`` and ``cli.trainer``, for notebooks.

    Args:
        args: options such as ``["--config", "distillation/dhkd_digits", "--trainer.max_epochs", "3"]``; with
            ``run=True`` the verb comes first.
        run: also run the verb.
        kwargs: further arguments of ``RunCLI``.
    """
    from lightning_kd.cli.run_cli import RunCLI
    from lightning_kd.core.quiet import quiet

    quiet()
    resolved, paths = with_config_paths(list(args or []))
    command = shlex.join(["lightning-kd", *(args or [])])
    return RunCLI(args=resolved, run=run, config_paths=paths, command=command, **kwargs)


def _run(argv: list[str]) -> None:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that users' own classes can be imported, as with python -m
    try:
        resolved, paths = with_config_paths(with_config_of_run(argv))
        from lightning_kd.cli.class_help import class_help, help_request
        from lightning_kd.cli.run_cli import RunCLI
        from lightning_kd.core.quiet import quiet

        quiet()
        if request := help_request(argv):
            print(class_help(*request))
            sys.exit(0)
        with stopped_by_signals():
            RunCLI(args=resolved, run=True, config_paths=paths, command=shlex.join(["lightning-kd", *argv]))
    except Exception as error:
        if not getattr(error, "told", False):
            if not isinstance(error, (ValueError, OSError, TypeError, ImportError)):
                raise
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
