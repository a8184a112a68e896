"""Turning off Lightning's messages that do not help a user of lightning_kd."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet"]


def quiet() -> None:
    """Turn off advice on workers for loaders that need none, lists of the hardware and similar messages."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # a ModelSummary that a user asks for is shown as a message
    logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI.s args parameter is intended.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*recommended to use `self.log\\(.*sync_dist=True.*",  # tasks reduce what they log themselves
        ".*Total length of `list` across ranks is zero.*",  # val_fraction 0
        ".*could not find the monitored key.*",  # best.ckpt without validation
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*torch.jit.script. is deprecated.*",  # raised inside torch, by forward-mode differentiation
    ):
        warnings.filterwarnings("ignore", message)
