"""The verbs of ``lightning-kd``, and the overview that it prints without one.

Only this file and ``config_names.py`` are imported before the verb is known, so that light verbs start fast.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHECKPOINT_VERBS", "OWN_VERBS", "VERBS", "Verb", "usage"]


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        sentence: its description in the overview.
        module: the module with its function, which has the name of the verb and the arguments ``(trainer, model,
            datamodule, ...)``; the further ones are the options. The module of a light or standalone verb has
            ``main(args)`` instead. Empty for Lightning's own verbs.
        light: whether it imports neither torch nor lightning.
        standalone: whether it parses its options itself, in ``main(args)``.
        of_checkpoint: whether it takes the config from the run of the given checkpoint or run folder.
        keeps_run: whether it works in a run folder and writes its record there.
    """

    sentence: str
    module: str = ""
    light: bool = False
    standalone: bool = False
    of_checkpoint: bool = False
    keeps_run: bool = True


VERBS = {
    "fit": Verb("train from a config:     lightning-kd fit --config distillation/dhkd_digits"),
    "validate": Verb("evaluate on the validation split, test on the test split, with --ckpt_path last | best | PATH"),
    "test": Verb(""),
    "predict": Verb("write predictions.csv into the run folder"),
    "teach": Verb(
        "store a teacher's logits for many students: lightning-kd teach --config distillation/kd_cifar100",
        "lightning_kd.cli.teach_command",
        keeps_run=False,
    ),
    "export": Verb(
        "a network for other programs:   lightning-kd export RUN --format onnx | torchscript | state_dict",
        "lightning_kd.cli.export_command",
        standalone=True,
    ),
    "shift": Verb(
        "optimum shifting of a finished checkpoint:  lightning-kd shift --ckpt_path RUN/checkpoints/last.ckpt",
        "lightning_kd.cli.shift_command",
        of_checkpoint=True,
    ),
    "sharpness": Verb(
        "measure how flat its minimum is:            lightning-kd sharpness --ckpt_path RUN/checkpoints/last.ckpt",
        "lightning_kd.cli.sharpness_command",
        of_checkpoint=True,
    ),
    "query": Verb(
        "choose what to label next from a pool: query_ROUND.csv in the run folder", "lightning_kd.cli.query_command"
    ),
    "label": Verb(
        "add a person's answers:  lightning-kd label FOLDER/query_00.csv", "lightning_kd.pool.label_command", light=True
    ),
    "active": Verb(
        "a whole active learning benchmark with an oracle: lightning-kd active --config active_learning/lfosa_digits",
        "lightning_kd.cli.active_command",
    ),
    "list": Verb(
        "methods, callbacks, data modules, networks, configs; one as a whole: lightning-kd list flatness/sam_digits",
        "lightning_kd.cli.class_list",
        light=True,
    ),
    "compare": Verb(
        "mean and std over seeds of finished runs: lightning-kd compare RUN...", "lightning_kd.compare", light=True
    ),
    "claim": Verb(
        "does a paper's claim hold in a small setting? lightning-kd claim list, then lightning-kd claim NAME",
        "lightning_kd.cli.claim_command",
        light=True,
    ),
}
OWN_VERBS = {name: verb for name, verb in VERBS.items() if verb.module and not (verb.light or verb.standalone)}
CHECKPOINT_VERBS = [name for name, verb in VERBS.items() if verb.of_checkpoint]


def usage() -> str:
    """The text of the overview of all verbs."""
    lines = ["usage: lightning-kd VERB [--config NAME_OR_PATH ...] [--run FOLDER] [options]", ""]
    lines += [f"  {name:<9} {verb.sentence}".rstrip() for name, verb in VERBS.items()]
    return "\n".join(
        [
            *lines,
            "",
            "  lightning-kd fit --help            all options; --model.help DHKD and --data.help CIFAR100DataModule "
            "those of a class",
            "  lightning-kd fit --print_config    the configuration as it would run",
            "  lightning-kd --version",
            "",
        ]
    )
