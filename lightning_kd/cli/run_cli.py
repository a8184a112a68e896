"""LightningCLI with a run folder and the verbs of lightning_kd."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_kd.callbacks  # noqa: F401  (classes are found by name once they are imported)
from lightning_kd.cli.active_command import run_active
from lightning_kd.cli.beginning import Beginning, FolderBefore
from lightning_kd.cli.command_words import default_run_folder
from lightning_kd.cli.composition import composed_arguments, own_files
from lightning_kd.cli.config_check import check_num_classes
from lightning_kd.cli.endings import check_still_there, report, tell
from lightning_kd.cli.new_samples import take_from_run, without_predict
from lightning_kd.cli.parameter_count import ParameterCount
from lightning_kd.cli.parser import RunParser
from lightning_kd.cli.pool_verbs import add_new_classes
from lightning_kd.cli.run_trainer import NO_RUN, RunTrainer, verb_module
from lightning_kd.cli.saved_config import check_same_run, config_text
from lightning_kd.cli.usage import OWN_VERBS, VERBS
from lightning_kd.core.distributed import is_first_process
from lightning_kd.core.registry import family_packages
from lightning_kd.core.run_callbacks import run_callbacks
from lightning_kd.core.run_folder import RunFolder
from lightning_kd.core.run_logger import RunLogger
from lightning_kd.core.starting_weights import weights_from_checkpoint
from lightning_kd.core.task import Task
from lightning_kd.data import OpenSetDataModule
from lightning_kd.pool import PoolRecord

__all__ = ["RunCLI"]

family_packages()


class RunCLI(LightningCLI):
    """Parses the command line, builds Trainer, model and data module, and runs the verb in a run folder.

    Args:
        config_paths: the config files among ``args``, whose names give the default run folder.
        command: the command line, for ``run.json``.
        kwargs: further arguments of ``LightningCLI``.
    """

    def __init__(self, config_paths: Sequence[str] = (), command: str = "", **kwargs: Any) -> None:
        if config_paths:
            kwargs["args"] = composed_arguments(kwargs["args"], config_paths)
        self.config_paths, self.command = list(config_paths), command
        self._verb = next(iter(kwargs.get("args") or ()), None)
        self._new_samples: str | None = None
        if self._verb == "predict":
            kwargs["args"], self._new_samples = without_predict(kwargs["args"])
        self._records = self._begins = self.later_round = False
        self.keeps_run = VERBS[self._verb].keeps_run if self._verb in VERBS else True
        self.only_prints = False  # True for test and validate in a read-only folder
        defaults: dict[str, Any] = {
            "trainer_class": RunTrainer,
            "model_class": Task,
            "datamodule_class": L.LightningDataModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "auto_configure_optimizers": False,
            "seed_everything_default": 0,
            "save_config_callback": None,  # Beginning writes it
            "parser_class": RunParser,
            "parser_kwargs": {"prog": "lightning-kd"},
        }
        with ExitStack() as self._held:
            try:
                super().__init__(**{**defaults, **kwargs})
                if self._records and self.is_first:
                    check_still_there(self)
            except BaseException as error:
                if self.is_first:
                    (report if self._records else tell)(self, error)
                raise
            if self._records and self.is_first:
                report(self, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> RunCLI:
        return self  # a callback may copy the model, which refers to this object

    def _parse_ckpt_path(self) -> None:
        """Do not merge the checkpoint's hyperparameters into the settings, which would override options."""

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, also before the Trainer starts the others."""
        return is_first_process()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # asked of the object alone
        """The called verb alone, because building the parsers of all verbs takes as long as a short fit."""
        verbs = {**LightningCLI.subcommands(), **{verb: {"model", "datamodule"} for verb in OWN_VERBS}}
        return {self._verb: verbs[self._verb]} if self._verb in verbs else verbs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.usage = "lightning-kd VERB [--config NAME_OR_PATH ...] [--run FOLDER] [options]"
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Folder for everything that the command writes. Default: runs/ and the name of the config.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Start anew in a folder that holds a last.ckpt (active: a pool.json).",
        )
        if self._verb == "predict":
            parser.add_argument(
                "--sort",
                type=Literal["index", "confidence"],
                default="index",
                help="Order of predictions.csv: by index, or the highest probability first.",
            )
        for name in ("num_classes", "input_shape", "problem"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def saved_config(self) -> str:
        """The text of ``config.yaml``, see ``config_text``."""
        return config_text(self._parser(self.subcommand), self._settings)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        for one in (parser, *getattr(self, "_subcommand_parsers", {}).values()):  # most errors are raised by a verb's
            if isinstance(one, RunParser):
                one.words, one.configs = list(args or ()), own_files(self.config_paths)
        super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        with weights_from_checkpoint(bool(self._settings.get("ckpt_path"))):
            super().instantiate_classes()
        check_num_classes(self._settings.model, self.datamodule)
        self.model.trainer = self.trainer  # so that schedules know the length of the training before it begins

    @property
    def _settings(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        config, verb = self._settings, self.subcommand
        fallback = str(config.model.class_path).rpartition(".")[2].lower()
        self.run_folder = folder = RunFolder(config.get("run") or default_run_folder(self.config_paths, fallback))
        self.beginning = Beginning(FolderBefore(folder), self.command)
        config["run"] = str(folder.path)
        add_new_classes(config, folder.pool)
        if verb in OWN_VERBS:
            getattr(verb_module(verb), "check", lambda config: None)(config)
            if verb != "active" and self.keeps_run:
                config["ckpt_path"] = config.get("ckpt_path") or "last"
        if verb is None:
            self.beginning.add(folder, None, None, self.saved_config())
        elif self.keeps_run and not config.trainer.get("fast_dev_run"):
            if folder.path.exists() and not folder.path.is_dir():
                raise NotADirectoryError(f"--run {str(folder.path)!r} is a file: name a folder")
            if not folder.can_be_written():
                if verb not in ("validate", "test"):
                    raise PermissionError(
                        f"{str(folder.path)!r} may not be written, where {verb} would leave its results: change its "
                        "permissions, or name another folder with --run, and a checkpoint by its path"
                    )
                self.only_prints = True
            self._check_checkpoint(config, folder)
            if verb == "predict":
                take_from_run(config, self._new_samples, folder)
            self._records = True
            # active writes its own, as settings differ by round
            if verb != "active" and self.is_first and not self.only_prints:
                text = self.saved_config() if verb == "fit" else None
                self.beginning.add(folder, verb, config.get("seed_everything"), text)
        elif verb == "predict":
            take_from_run(config, self._new_samples, folder)

    def _check_checkpoint(self, config: Any, folder: RunFolder) -> None:
        if config.get("ckpt_path") in ("last", "best"):
            config["ckpt_path"] = str(folder.checkpoint(config["ckpt_path"]))
        config["weights_only"] = True
        given = config.get("ckpt_path")
        elsewhere = given and Path(given).absolute().parent.parent != folder.path.absolute()
        anew = self._begins = self.subcommand == "fit" and (not given or bool(elsewhere))
        if self.subcommand not in ("fit", "active") and not config.get("ckpt_path") and folder.last.is_file():
            raise ValueError(
                f"{self.subcommand} without --ckpt_path would take untrained weights, and {folder.path} holds trained "
                "ones: add --ckpt_path last or best, or name another --run folder"
            )
        if self.is_first and not self.only_prints:
            self._held.enter_context(folder.alone())
        if self.subcommand == "fit" and config.get("ckpt_path") and self.is_first:
            check_same_run(self.saved_config(), config["ckpt_path"])
        if anew and folder.last.is_file() and not config["overwrite"] and self.is_first:
            raise FileExistsError(
                f"{folder.path} holds a last.ckpt: add --ckpt_path last to go on, --overwrite to start anew, or "
                "another --run folder"
            )
        folder.read_record()  # raises if run.json is not of lightning-kd
        if anew and config["overwrite"] and self.is_first:
            folder.check_is_run()

    def before_fit(self) -> None:
        # everything is parsed and built without error: now an earlier fit can be removed
        config = self.config["fit"]
        if config["overwrite"] and self._records and self.is_first and self._begins:
            if isinstance(self.datamodule, OpenSetDataModule) and self.run_folder.pool.is_file():
                self.datamodule.setup()
                self.datamodule.set_record(PoolRecord.load(self.run_folder.pool))  # raises if it is another pool's
            self.beginning.before.set_aside(self.run_folder.written())
            self.run_folder.clear()

    def active(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        """Run all rounds, each with a new Trainer, model and data module."""
        run_active(self)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        given = config.get("trainer", {})
        kwargs["default_root_dir"] = str(self.run_folder.path)
        callbacks = given.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if not self.keeps_run:
            return super().instantiate_trainer(**kwargs, **NO_RUN)
        if not given.get("fast_dev_run"):
            callbacks.append(self.beginning)
        if given.get("barebones"):
            return super().instantiate_trainer(**kwargs, callbacks=callbacks)
        asked = given.get("enable_model_summary") is not None or any(isinstance(c, ModelSummary) for c in callbacks)
        if not asked or self.later_round:  # printed in the first round only
            kwargs["enable_model_summary"] = False
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelSummary)]
            callbacks += [] if self.later_round else [ParameterCount()]
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar(refresh_rate=4))  # redraws per second
        ours = run_callbacks(self.run_folder, self.model.monitor, self.model.monitor_mode, config.get("sort", "index"))
        if given.get("enable_checkpointing") is False or given.get("fast_dev_run"):
            ours = [callback for callback in ours if not isinstance(callback, ModelCheckpoint)]
        kwargs["callbacks"] = [*callbacks, *ours]
        logger = given.get("logger")
        if logger is not False:
            own = [] if self.only_prints else [RunLogger(self.run_folder.path)]
            others = [] if logger is None or logger is True else logger if isinstance(logger, list) else [logger]
            kwargs["logger"] = [*own, *others] or False
        return super().instantiate_trainer(**kwargs)
