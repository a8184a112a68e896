"""LightningCLI with a run folder."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

import lightning_kd.callbacks
import lightning_kd.data  # noqa: F401  (classes are found by name once they are imported)
from lightning_kd.cli import default_run_folder
from lightning_kd.core.registry import family_packages
from lightning_kd.core.run import RunFolder, RunLogger, run_callbacks, write_text
from lightning_kd.core.task import Task

family_packages()


class SaveRunConfig(SaveConfigCallback):
    """``config.yaml`` of a fit, as it can be given to ``--config`` again."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            config = self.config.clone()
            for key, value in (("ckpt_path", None), ("overwrite", False), ("run", None)):
                if key in config:
                    config[key] = value
            path = Path(trainer.default_root_dir) / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(config, path, skip_none=False, overwrite=True, multifile=False)


class RunCLI(LightningCLI):
    """The parser and the objects behind every verb.

    Args:
        config_paths: the config files among ``args``, which name the default run folder.
        command: the command line for ``run.json``.
        kwargs: further arguments of ``LightningCLI``.
    """

    def __init__(self, config_paths: Sequence[str] = (), command: str = "", **kwargs: Any) -> None:
        self.config_paths = list(config_paths)
        self.command = command
        self.run_folder: RunFolder | None = None
        defaults: dict[str, Any] = {
            "model_class": Task,
            "datamodule_class": L.LightningDataModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "auto_configure_optimizers": False,
            "seed_everything_default": 0,
            "save_config_callback": SaveRunConfig,
            "save_config_kwargs": {"save_to_log_dir": False, "overwrite": True},
            "parser_kwargs": {"prog": "lightning-kd"},
        }
        try:
            super().__init__(**{**defaults, **kwargs})
        except BaseException as error:
            if self.run_folder is not None and self.run_folder.record:
                self._report(error)
            raise
        if self.run_folder is not None and self.run_folder.record:
            self._report(None)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.usage = "lightning-kd VERB [--config NAME_OR_PATH ...] [--run FOLDER] [options]"
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Folder for all that the command leaves behind. Default: runs/ and the name of the config.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Start anew in a folder that holds a last.ckpt.",
        )
        for name in ("num_classes", "input_shape"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    # -- the run folder ----------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        fallback = str(config.model.class_path).rpartition(".")[2].lower()
        folder = RunFolder(config.get("run") or default_run_folder(self.config_paths, fallback))
        self.run_folder = folder
        config["run"] = str(folder.path)
        if self.subcommand is None or config.trainer.get("fast_dev_run"):
            return
        # only here: LightningCLI merges the hyperparameters of a checkpoint given by path over the command line
        if config.get("ckpt_path") in ("last", "best"):
            config["ckpt_path"] = str(folder.checkpoint(config["ckpt_path"]))
        config["weights_only"] = True
        anew = self.subcommand == "fit" and not config.get("ckpt_path")
        if self.subcommand != "fit" and not config.get("ckpt_path") and folder.last.is_file():
            raise ValueError(
                f"{self.subcommand} without --ckpt_path would take untrained weights, and {folder.path} holds trained "
                "ones: add --ckpt_path last or best, or name another --run folder"
            )
        if anew and folder.last.is_file() and not config["overwrite"] and _is_rank_zero():
            raise FileExistsError(
                f"{folder.path} holds a last.ckpt: add --ckpt_path last to go on, --overwrite to start anew, or "
                "another --run folder"
            )
        if _is_rank_zero():
            folder.begin(self.subcommand, self.command, config.get("seed_everything"))

    def before_fit(self) -> None:
        # all is parsed and built: now an earlier fit may be thrown away
        assert self.run_folder is not None
        config = self.config["fit"]
        if config["overwrite"] and self.run_folder.record and not config.get("ckpt_path"):
            self.run_folder.clear()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        assert self.run_folder is not None
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        given = config.get("trainer", {})
        kwargs["default_root_dir"] = str(self.run_folder.path)
        if given.get("barebones"):
            return super().instantiate_trainer(**kwargs)
        callbacks = given.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar(refresh_rate=4))  # redraws a second
        ours = run_callbacks(self.run_folder, self.model.monitor, self.model.monitor_mode)
        if given.get("enable_checkpointing") is False or given.get("fast_dev_run"):
            ours = [callback for callback in ours if not isinstance(callback, ModelCheckpoint)]
        kwargs["callbacks"] = [*callbacks, *ours]
        logger = given.get("logger")
        if logger is None or logger is True:
            kwargs["logger"] = RunLogger(self.run_folder.path)
        elif logger is not False:
            others = logger if isinstance(logger, list) else [logger]
            kwargs["logger"] = [RunLogger(self.run_folder.path), *others]
        return super().instantiate_trainer(**kwargs)

    # -- how it ends -------------------------------------------------------------------------------------------------

    def _report(self, error: BaseException | None) -> None:
        """Note the outcome in ``run.json`` and print what was reached, where it is and the command that goes on."""
        folder, trainer = self.run_folder, getattr(self, "trainer", None)
        assert folder is not None
        if not _is_rank_zero():
            return
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        outcome = "finished" if error is None else "interrupted" if interrupted else "failed"
        metrics = {} if trainer is None else {k: float(v) for k, v in trainer.callback_metrics.items()}
        epochs = 0 if trainer is None else trainer.current_epoch
        details: dict[str, Any] = {"epochs": epochs, "metrics": metrics}
        if error is not None and not interrupted:
            cause = error
            while cause.__cause__ is not None and str(cause).startswith("Does not validate"):
                cause = cause.__cause__  # jsonargparse wraps what a constructor raised
            details["error"] = f"{type(cause).__name__}: {cause}"
            write_text(folder.path / "traceback.txt", "".join(traceback.format_exception(error)))
            print(f"error: {cause}\n(trace in {folder.path / 'traceback.txt'})", file=sys.stderr)
            error.told = True  # type: ignore[attr-defined]
        folder.end(outcome, **details)
        reached = [f"{self.subcommand} {outcome}"]
        if self.subcommand == "fit" and error is None and not metrics:
            reached.append("with nothing left to train, as --trainer.max_epochs is reached,")
        if self.subcommand == "fit":
            reached.append(f"after {epochs} epoch{'' if epochs == 1 else 's'}")
        shown = [f"{k} {v:.4g}" for k, v in sorted(metrics.items()) if k.startswith(("val/", "test/"))]
        print(
            f"\n{' '.join(reached)}{': ' if shown else ''}{', '.join(shown)}\nin {folder.path}/\n{self._next(outcome)}"
        )

    def _next(self, outcome: str) -> str:
        folder = self.run_folder
        assert folder is not None
        trained = self.subcommand == "fit" and folder.last.is_file()
        if outcome == "finished":
            test = f"lightning-kd test --config {shlex.quote(f'{folder.path}/config.yaml')} --ckpt_path last"
            return f"next: {test}" if trained else "next: lightning-kd compare RUN..."
        return f"go on with: {resume_command(self.command) if trained else self.command}"


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def resume_command(command: str) -> str:
    """The command that goes on where ``command`` stopped."""
    kept: list[str] = []
    previous = ""
    for word in shlex.split(command):
        value = previous in ("--ckpt_path", "--overwrite") and not word.startswith("-")
        if not value and word.partition("=")[0] not in ("--ckpt_path", "--overwrite"):
            kept.append(word)
        previous = word
    return shlex.join([*kept, "--ckpt_path", "last"])


def quiet() -> None:
    """Leave the screen to what the user needs: no advice on workers for loaders that need none, no hardware lists."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI.s args parameter is intended.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*recommended to use `self.log\\(.*sync_dist=True.*",  # what tasks log is reduced already
        ".*Total length of `list` across ranks is zero.*",  # val_fraction 0
        ".*could not find the monitored key.*",  # best.ckpt where nothing is validated
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)
