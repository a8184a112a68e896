"""Small pools and short rounds on the real digits."""

import lightning as L
import torch
import torch.nn.functional as F

from lightning_kd.active_learning import PoolTask, take_best
from lightning_kd.core.losses import at_least_float32
from lightning_kd.data import DigitsDataModule, OpenSetDataModule

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Greedy(PoolTask):
    """Trains a small MLP and queries the samples it is least sure of, with some noise, or those of ``chosen``."""

    def __init__(self, num_classes=4, input_shape=(1, 8, 8), chosen=None, **kwargs):
        super().__init__(num_classes, input_shape=input_shape, **kwargs)
        self.network = self.build("mlp_8")
        self.chosen = chosen

    @property
    def main_network(self):
        return self.network

    def training_step(self, batch, batch_idx):
        (logits,) = at_least_float32(self(batch.image))
        return self.step_loss({"ce": F.cross_entropy(logits, batch.target)}, logits, batch.target)

    def select(self, scores, pool, budget, generator):
        if self.chosen is not None:
            return self.chosen(pool, budget)
        noise = torch.from_numpy(generator.random(len(pool.unlabelled)))
        return take_best(-scores["probabilities"].max(1).values + 0.1 * noise, pool, budget)


def pool_data(**kwargs):
    source = {name: kwargs.pop(name) for name in ("batch_size", "eval_batch_size") if name in kwargs}
    source = DigitsDataModule(**{"val_fraction": 0.0, "batch_size": 32, **source})
    return OpenSetDataModule(source, **{"known_classes": 4, "initial_count": 40, "budget": 30, "rounds": 2, **kwargs})


def trainer_of(folder=None, **kwargs):
    return L.Trainer(**{**QUIET, "enable_checkpointing": False, "max_epochs": 2, "default_root_dir": folder, **kwargs})


def starter(task=Greedy, data=None, trainer=None, **settings):
    """The function ``start`` that ``run_rounds`` calls for each round."""

    def start(number, folder):
        return trainer_of(folder, **(trainer or {})), task(**settings), pool_data(**(data or {}))

    return start
