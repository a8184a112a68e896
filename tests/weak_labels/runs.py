"""Short fits on made-up digits with candidate labels."""

import lightning as L
import torch

from lightning_kd.data import DigitsDataModule, UniformCandidates

SHAPE = (1, 8, 8)


def data_module(q=0.4, **options):
    given = {"fake": True, "batch_size": 32, "val_fraction": 0.0, "meta_per_class": 2, **options}
    return DigitsDataModule(candidates=UniformCandidates(q), **given)


def trainer_of(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def built(method, network="mlp_16", **options):
    L.seed_everything(0, verbose=False)
    return method(network, 10, input_shape=SHAPE, channels_last=False, **options)


def fitted(method, data=None, ckpt_path=None, trainer=None, **options):
    """``(task, trainer)`` after two epochs with a small network."""
    task, trainer = built(method, **options), trainer or trainer_of()
    trainer.fit(task, datamodule=data_module() if data is None else data, ckpt_path=ckpt_path)
    return task, trainer


def resumes_to_the_bit(method, folder, **options):
    """Whether a run stopped after one epoch and resumed ends with the weights and memories of an undisturbed one."""
    whole, _ = fitted(method, **options)
    _, trainer = fitted(method, trainer=trainer_of(max_epochs=1), **options)
    trainer.save_checkpoint(folder / "one.ckpt")
    again, trainer = fitted(method, ckpt_path=folder / "one.ckpt", **options)
    pairs = list(zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    pairs += [(whole.memories[name].rows, again.memories[name].rows) for name in whole.memories]
    return trainer.current_epoch == 2 and bool(pairs) and all(torch.equal(a, b) for a, b in pairs)
