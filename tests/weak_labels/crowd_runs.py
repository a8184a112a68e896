"""Small fits of the methods for several annotators."""

import lightning as L
import numpy as np
import torch

from lightning_kd.data import CrowdLabels, DigitsDataModule, SimulatedCrowd


class SomeCrowd(CrowdLabels):
    """Four annotators: the last gave nothing, and a third of the samples has no annotation."""

    def draw(self, clean, generator):
        given = SimulatedCrowd(3, (0.6, 0.9), 1).draw(clean, generator)
        given[::3] = -1
        return np.concatenate([given, np.full((len(given), 1), -1)], 1)


def crowd_data(crowd=None, **options):
    crowd = SomeCrowd(imbalance=6.0) if crowd is None else crowd
    return DigitsDataModule(**{"train_per_class": 24, "batch_size": 32, "annotations": crowd, **options})


def even_data(**options):
    """Two annotations of each of 160 samples, which make whole batches of 32."""
    crowd = SimulatedCrowd(4, (0.6, 0.9), 2)
    return crowd_data(crowd, **{"train_per_class": 16, "val_fraction": 0.0, **options})


def trainer_of(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 2, "num_sanity_val_steps": 0, **options})


def built(method, network="mlp_16", **options):
    L.seed_everything(0, verbose=False)
    return method(network, 10, input_shape=(1, 8, 8), **options)


def fitted(method, data=None, trainer=None, ckpt_path=None, **options):
    """``(task, data, trainer)`` after a fit."""
    task, data = built(method, **options), crowd_data() if data is None else data
    trainer = trainer or trainer_of()
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    return task, data, trainer


def resumes_to_the_bit(method, folder, **options):
    """Whether a run stopped after two of four epochs and resumed ends with the state of an undisturbed one."""
    whole, _, _ = fitted(method, trainer=trainer_of(max_epochs=4), **options)
    _, _, trainer = fitted(method, trainer=trainer_of(max_epochs=2), **options)
    trainer.save_checkpoint(folder / "two.ckpt")
    again, _, _ = fitted(method, trainer=trainer_of(max_epochs=4), ckpt_path=folder / "two.ckpt", **options)
    pairs = list(zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    pairs += [(memory.rows, again.memories[name].rows) for name, memory in whole.memories.items()]
    if hasattr(whole, "pseudo"):
        pairs.append((whole.pseudo, again.pseudo))
    return all(torch.equal(a, b) for a, b in pairs)
