"""LightningCLI with a run folder."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

import lightning_kd.callbacks  # noqa: F401  (classes are found by name once they are imported)
from lightning_kd.active_learning.pool_task import PoolTask
from lightning_kd.active_learning.queries import write_query
from lightning_kd.active_learning.round_folders import forget_rounds
from lightning_kd.active_learning.rounds import run_rounds
from lightning_kd.checkpoint_verbs import measure_checkpoint, shift_checkpoint
from lightning_kd.cli import default_run_folder
from lightning_kd.compare.runs import flat
from lightning_kd.core.registry import family_packages
from lightning_kd.core.run import run_callbacks
from lightning_kd.core.run_folder import RunFolder, write_text
from lightning_kd.core.run_logger import RunLogger
from lightning_kd.core.task import Task
from lightning_kd.data import OpenSetDataModule
from lightning_kd.pool import PoolRecord
from lightning_kd.pool.label_curves import table
from lightning_kd.pool.pool_record import alone

family_packages()


class RunTrainer(L.Trainer):
    """A Trainer with further verbs, done by ``RunCLI``. They take what the ``config.yaml`` of a fit holds."""

    def shift(
        self,
        model: Any,
        datamodule: Any,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        layers: list[str] | None = None,
        mode: str = "fixed",
        selection: str = "class_balanced",
        samples: int | None = None,
        held_out: int = 1000,
        guard: float | None = 0.05,
        rtol: float | None = None,
        force: bool = False,
        seed: int = 0,
        output: str | None = None,
    ) -> None:
        """Shift layers of last.ckpt, unless told otherwise, and write the result beside it, with shift.json.

        Args:
            ckpt_path: last, best or a path.
            layers: module paths inside the network. Default: its classifier.
            mode: fixed, joint or free: what becomes of the bias.
            selection: the samples whose outputs stay: class_balanced, random, class_means, or all of the training set.
            samples: how many. Default: 3 a class and at least 100, fewer than the layer has inputs.
            held_out: training samples beside them, on which the loss is watched.
            guard: undo the shift where that loss rises by more than this share; null for never.
            rtol: singular values up to this share of the largest count as 0. Default: by the precision.
            force: shift even if classes are missing among the samples.
            seed: of the draw of the samples.
            output: the new checkpoint, no file that exists. Default: shifted.ckpt beside the old one.
        """
        raise NotImplementedError("shift is a command: lightning-kd shift")

    def sharpness(
        self,
        model: Any,
        datamodule: Any,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        samples: int = 1000,
        max_probes: int = 200,
        slices: str = "1d",
        points: int | None = None,
        seed: int = 0,
    ) -> None:
        """Measure how flat last.ckpt is, unless told otherwise: a table, sharpness.json, pictures of the loss.

        Args:
            ckpt_path: last, best or a path.
            samples: training samples, without augmentation, that the loss is the mean over.
            max_probes: products with the Hessian for its trace, at most; it stops at a standard error of 2 percent.
            slices: pictures of the loss around the weights: 1d, 2d, both or none.
            points: of a slice along each direction. Default: 51 in 1d, 21 in 2d.
            seed: of the samples, the probes and the directions.
        """
        raise NotImplementedError("sharpness is a command: lightning-kd sharpness")

    def query(
        self, model: Any, datamodule: Any, ckpt_path: str | None = None, weights_only: bool | None = None
    ) -> None:
        """Choose what to label next, with the weights of last.ckpt unless told otherwise: query_ROUND.csv."""
        raise NotImplementedError("query is a command: lightning-kd query")

    def active(
        self, model: Any, datamodule: Any, ckpt_path: str | None = None, weights_only: bool | None = None
    ) -> None:
        """The whole active learning benchmark: train, test, query, ask the oracle, until the budget is spent."""
        raise NotImplementedError("active is a command: lightning-kd active")


class SaveRunConfig(SaveConfigCallback):
    """``config.yaml`` of a fit, as it can be given to ``--config`` again."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.write(Path(trainer.default_root_dir))

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``."""
        write_text(folder / "config.yaml", self.dump())

    def dump(self) -> str:
        """The text of the file."""
        config = self.config.clone()
        for key, value in (("ckpt_path", None), ("overwrite", False), ("run", None)):
            if key in config:
                config[key] = value
        return self.parser.dump(config, skip_none=False)


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
        self._verb = next(iter(kwargs.get("args") or ()), None)
        self.run_folder: RunFolder | None = None
        self._later_round = False
        self._query_file: Path | None = None
        self._shifted: Path | None = None
        defaults: dict[str, Any] = {
            "trainer_class": RunTrainer,
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # asked of the object alone
        """The verb that is called; all where it is none: building the parsers of all takes as long as a short fit."""
        own = ("shift", "sharpness", "query", "active")
        verbs = {**LightningCLI.subcommands(), **{verb: {"model", "datamodule"} for verb in own}}
        return {self._verb: verbs[self._verb]} if self._verb in verbs else verbs

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
            help="Start anew in a folder that holds a last.ckpt (active: a pool.json).",
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
        if self.subcommand in ("query", "active"):
            self._before_pool_verb(config)
        elif self.subcommand in ("shift", "sharpness"):
            config["ckpt_path"] = config.get("ckpt_path") or "last"
        if self.subcommand is None or config.trainer.get("fast_dev_run"):
            return
        # only here: LightningCLI merges the hyperparameters of a checkpoint given by path over the command line
        if config.get("ckpt_path") in ("last", "best"):
            config["ckpt_path"] = str(folder.checkpoint(config["ckpt_path"]))
        config["weights_only"] = True
        anew = self.subcommand == "fit" and not config.get("ckpt_path")
        evaluates = self.subcommand not in ("fit", "active")
        if evaluates and not config.get("ckpt_path") and folder.last.is_file():
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
            if isinstance(self.datamodule, OpenSetDataModule) and self.run_folder.pool.is_file():
                self.datamodule.setup()
                self.datamodule.use(PoolRecord.load(self.run_folder.pool))  # or it is another pool
            self.run_folder.clear()

    # -- the verbs of checkpoints ------------------------------------------------------------------------------------

    def shift(self, model: Task, datamodule: Any, ckpt_path: str, weights_only: Any, **options: Any) -> None:
        """Write a checkpoint with shifted layers."""
        assert self.run_folder is not None
        self._shifted = shift_checkpoint(self.trainer, model, datamodule, self.run_folder, ckpt_path, **options)

    def sharpness(
        self, model: Task, datamodule: Any, ckpt_path: str, weights_only: bool | None, **options: Any
    ) -> None:
        """Measure a checkpoint."""
        assert self.run_folder is not None
        measure_checkpoint(self.trainer, model, datamodule, self.run_folder, ckpt_path, **options)

    # -- the verbs of pools ------------------------------------------------------------------------------------------

    def _before_pool_verb(self, config: Any) -> None:
        assert self.run_folder is not None
        if config.trainer.get("fast_dev_run"):
            raise ValueError(
                f"{self.subcommand} keeps what it finds, got fast_dev_run={config.trainer.fast_dev_run}: try --trainer."
                "max_epochs 1 with another --run folder instead"
            )
        if self.subcommand == "query":
            config["ckpt_path"] = config.get("ckpt_path") or "last"
            return
        if config.get("ckpt_path"):
            raise ValueError(f"active goes on by itself, got ckpt_path={config['ckpt_path']}: leave it out")
        if type(config.get("seed_everything")) is not int:
            raise ValueError(f"active needs a seed, got seed_everything={config.get('seed_everything')}: give a number")
        if self.run_folder.last.is_file():
            raise FileExistsError(f"{self.run_folder.path} holds a single fit: name another --run folder for active")

    def _check_pool(self) -> Any:
        """The data module, set up, if this is a method for pools on a pool."""
        assert self.run_folder is not None
        if not isinstance(self.model, PoolTask) or not isinstance(self.datamodule, OpenSetDataModule):
            raise ValueError(
                f"{self.subcommand} needs a method for pools on an OpenSetDataModule, got {type(self.model).__name__} "
                f"on {type(self.datamodule).__name__}: see the configs active_learning/... of lightning-kd list"
            )
        self.datamodule.setup()
        return self.datamodule

    def _alone(self) -> AbstractContextManager[None]:
        assert self.run_folder is not None
        return alone(self.run_folder.path) if _is_rank_zero() else nullcontext()

    def query(self, model: PoolTask, datamodule: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Write ``query_ROUND.csv``."""
        assert self.run_folder is not None
        data = self._check_pool()
        with self._alone():
            self._query_file = write_query(self.trainer, model, data, self.run_folder.path, ckpt_path)

    def active(self, model: PoolTask, datamodule: Any, **kwargs: Any) -> None:
        """Run all rounds, each with objects of its own."""
        assert self.run_folder is not None
        self._check_pool().oracle([])  # or there is none
        with self._alone():
            self._run_rounds()

    def _run_rounds(self) -> None:
        assert self.run_folder is not None
        whole, config = self.run_folder, self.config["active"]
        seed = config["seed_everything"]
        if _is_rank_zero():
            if config["overwrite"]:
                forget_rounds(whole.path)
            saved = SaveRunConfig(self._parser("active"), config, overwrite=True)
            if whole.pool.is_file():
                _check_same_recipe(saved.dump(), whole.path / "config.yaml")
                self.datamodule.use(PoolRecord.load(whole.pool))
            saved.write(whole.path)

        def enter(folder: RunFolder, seed: int, outcome: str) -> None:
            assert self.run_folder is not None
            if self.run_folder is not whole and self.run_folder.record:
                self.run_folder.end(outcome)
            self.run_folder = folder
            config["seed_everything"], config["run"] = seed, str(folder.path)

        def start(number: int, path: Path) -> tuple[L.Trainer, PoolTask, Any]:
            folder = RunFolder(path)
            enter(folder, seed + number, "finished")
            if _is_rank_zero() and not folder.record_file.is_file():
                folder.begin("fit", self.command, seed + number)
            self.instantiate_classes()
            self._later_round = True
            return self.trainer, self.model, self.datamodule

        outcome = "failed"
        try:
            rows = run_rounds(start, whole.path, seed)
            outcome = "finished"
        finally:
            enter(whole, seed, outcome)
        if _is_rank_zero():
            print(f"\n{table(rows)}")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        assert self.run_folder is not None
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        given = config.get("trainer", {})
        kwargs["default_root_dir"] = str(self.run_folder.path)
        if self._later_round:  # once is enough
            kwargs["enable_model_summary"] = False
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
        config = shlex.quote(f"{folder.path}/config.yaml")
        if outcome == "finished":
            if self.subcommand == "query":
                path = shlex.quote(str(self._query_file))
                return f"next: fill in the column label of {path}, then lightning-kd label {path}"
            if self._shifted is not None:
                return f"next: lightning-kd test --config {config} --ckpt_path {shlex.quote(str(self._shifted))}"
            if trained and getattr(self.datamodule, "pool_path", None) is not None:
                return f"next: lightning-kd query --config {config}"
            return (
                f"next: lightning-kd test --config {config} --ckpt_path last"
                if trained
                else "next: lightning-kd compare RUN..."
            )
        if self.subcommand == "active":
            return f"go on with: {resume_command(self.command, None)}"
        return f"go on with: {resume_command(self.command) if trained else self.command}"


# what may change while a benchmark goes on: more rounds, another machine, another look
_FREE = ("data.init_args.rounds", "run", "overwrite", "ckpt_path", "weights_only")
_FREE_OF_TRAINER = (
    *("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "profiler", "default_root_dir"),
    *("log_every_n_steps", "plugins", "benchmark", "deterministic", "check_val_every_n_epoch"),
)


def _check_same_recipe(text: str, path: Path) -> None:
    """Raise a ``ValueError`` where the rounds in the folder of ``path`` were made with other settings."""
    if not path.is_file():
        return
    old, new = (flat(yaml.safe_load(content)) for content in (path.read_text(), text))
    free = (*_FREE, *(f"trainer.{name}" for name in _FREE_OF_TRAINER), "trainer.enable_")
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(free):
            raise ValueError(
                f"the rounds in {path.parent} were made with {key}={old.get(key)}, got {new.get(key)}: keep it, name "
                "another --run folder, or add --overwrite to lose them"
            )


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def resume_command(command: str, ckpt_path: str | None = "last") -> str:
    """The command that goes on where ``command`` stopped; ``active`` knows by itself from where."""
    kept: list[str] = []
    previous = ""
    for word in shlex.split(command):
        value = previous in ("--ckpt_path", "--overwrite") and not word.startswith("-")
        if not value and word.partition("=")[0] not in ("--ckpt_path", "--overwrite"):
            kept.append(word)
        previous = word
    return shlex.join([*kept, *(["--ckpt_path", ckpt_path] if ckpt_path else [])])


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
