"""Silences what Lightning says to its user without being asked."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet"]


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
        ".*torch.jit.script. is deprecated.*",  # torch's own, where it differentiates forwards
    ):
        warnings.filterwarnings("ignore", message)
