"""Short fits of a linear layer, on four batches an epoch."""

from functools import partial

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.core import Classification


class Rates(L.Callback):
    """Records the learning rate at the start of each epoch."""

    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer(epochs, *callbacks, **options):
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(count=32, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    image = spread * torch.randn(count, 4, generator=generator)
    return DataLoader(TensorDataset(image, torch.randint(0, 3, (count,), generator=generator)), batch_size=8)


def sgd(lr=0.1):
    return partial(torch.optim.SGD, lr=lr)


def rates_of(schedule, epochs, ckpt_path=None, save=None, limits=None, stop=None, **options):
    """The learning rate of each epoch of a fit with 4 steps an epoch, ended after epoch ``stop`` if given."""

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop |= trainer.current_epoch == stop

    seen = Rates()
    task = Classification(nn.Linear(4, 3), 3, optimizer=sgd(), lr_scheduler=schedule, **options)
    fitter = trainer(epochs, seen, Stop(), **(limits or {}))
    fitter.fit(task, loader(), ckpt_path=ckpt_path, weights_only=True)
    if save is not None:
        fitter.save_checkpoint(save)
    return seen.rates
