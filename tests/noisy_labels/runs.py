"""Short fits on generated digits."""

import lightning as L
import torch

from lightning_kd.data import DigitsDataModule, SymmetricNoise


def data_module(**kwargs):
    noise = SymmetricNoise(0.4, "exclusive")
    return DigitsDataModule(**{"fake": True, "batch_size": 32, "val_fraction": 0.0, "noise": noise, **kwargs})


def trainer_of(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, **kwargs})


def fitted(method, data=None, ckpt_path=None, trainer=None, **kwargs):
    """``(task, trainer)`` after two epochs of ``method`` with the tiny network."""
    L.seed_everything(0, verbose=False)
    task = method("cnn_tiny", 10, input_shape=(1, 8, 8), channels_last=False, **kwargs)
    trainer = trainer or trainer_of()
    trainer.fit(task, datamodule=data or data_module(), ckpt_path=ckpt_path)
    return task, trainer


def resumes_to_the_bit(method, folder, epochs=3, **kwargs):
    """Whether a run stopped after one epoch and resumed ends with the weights and memories of an undisturbed one."""
    whole, _ = fitted(method, trainer=trainer_of(max_epochs=epochs), **kwargs)
    _, trainer = fitted(method, trainer=trainer_of(max_epochs=1), **kwargs)
    trainer.save_checkpoint(folder / "one.ckpt")
    again, _ = fitted(method, trainer=trainer_of(max_epochs=epochs), ckpt_path=folder / "one.ckpt", **kwargs)
    pairs = list(zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    pairs += [(whole.memories[name].rows, again.memories[name].rows) for name in whole.memories]
    return all(torch.equal(a, b) for a, b in pairs)
