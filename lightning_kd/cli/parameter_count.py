"""One line on the size of what is trained, in place of Lightning's table."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch.nn.parameter import UninitializedParameter

__all__ = ["ParameterCount"]


class ParameterCount(L.Callback):
    """Prints how many parameters are trained and how many are frozen, before the first epoch."""

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        count = {True: 0, False: 0}
        for parameter in pl_module.parameters():
            if not isinstance(parameter, UninitializedParameter):
                count[parameter.requires_grad] += parameter.numel()
        frozen = f", {count[False]:,} frozen" if count[False] else ""
        print(f"{type(pl_module).__name__}: {count[True]:,} parameters trained{frozen}")
