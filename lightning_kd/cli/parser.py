"""The parser whose errors are one sentence."""

from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["RunParser"]


class RunParser(LightningArgumentParser):
    """LightningCLI's parser."""
