"""A line with the number of trained parameters, instead of Lightning's table."""

from __future__ import annotations

from itertools import chain

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch.nn.parameter import UninitializedParameter

from lightning_kd.core.teacher import FrozenTeacher

__all__ = ["ParameterCount"]


class ParameterCount(L.Callback):
    """Prints the number of trained and of frozen parameters before the first epoch."""

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        count = {True: 0, False: 0}
        teachers = [module for module in pl_module.modules() if isinstance(module, FrozenTeacher)]
        for parameter in chain(pl_module.parameters(), *(teacher.parameters() for teacher in teachers)):
            if not isinstance(parameter, UninitializedParameter):
                count[parameter.requires_grad] += parameter.numel()
        frozen = f", {count[False]:,} frozen" if count[False] else ""
        print(f"{type(pl_module).__name__}: {count[True]:,} parameters trained{frozen}")
