"""What a task logs: means over samples, whatever the sizes of the batches."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import Classification


def test_metrics_are_means_over_samples_not_over_batches():
    still = partial(torch.optim.SGD, lr=0.0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    task = Classification(network, 10, input_shape=(1, 8, 8), optimizer=still)
    image, target = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    image[30:] *= 50  # the small last batch is unlike the others
    loader = DataLoader(TensorDataset(image, target), batch_size=30)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with torch.no_grad():
        logits = network(image)
    loss, accuracy = float(F.cross_entropy(logits, target)), float((logits.argmax(1) == target).float().mean())
    trainer.fit(task, loader, loader)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found |= trainer.test(task, loader, verbose=False)[0]
    for name in ("train", "val", "test"):
        assert found[f"{name}/loss"] == pytest.approx(loss, rel=1e-4)
        assert found[f"{name}/acc"] == pytest.approx(accuracy, rel=1e-4)
    of_batches = float(F.cross_entropy(logits[:30], target[:30]) + F.cross_entropy(logits[30:], target[30:])) / 2
    assert abs(of_batches - loss) > 0.5
