"""The argument parser, whose error messages are one sentence."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_kd.cli.suggestions import one_sentence

__all__ = ["RunParser"]


class RunParser(LightningArgumentParser):
    """LightningCLI's parser with short errors, without the usage and jsonargparse's list of all types that it tried.

    With ``JSONARGPARSE_DEBUG`` in the environment both are printed.

    Attributes:
        words: the words of the command line. An error about an option that is not among them names the ``configs``.
        configs: the paths of the config files.
    """

    words: Sequence[str] = ()
    configs: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = re.findall(r"--[\w.]+", parser.format_help())
        sentence = one_sentence(message, options)
        flags = {word.partition("=")[0] for word in self.words}
        if self.configs and not flags & set(re.findall(r"--[\w.]+", sentence.partition(":")[0])):
            sentence += f" (in {', '.join(self.configs)})"
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
