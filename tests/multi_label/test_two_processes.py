"""Two gloo processes take the steps of one with the joint batch: the losses of L2D and PAT."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_kd.distillation import L2D
from lightning_kd.multi_label import PAT
from lightning_kd.nets import with_ml_decoder
from tests.multi_label.runs import CLASSES, SHAPE, Labels, trainer_of
from tests.two_processes import on_two_ranks


def small_tagger():
    """A network without batch normalisation and dropout, which differ between processes."""
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(128, 1))
    options = {"embedding_dim": 8, "heads": 2, "inner_dim": 8, "dropout": 0.0, "feature_map": "2"}
    return with_ml_decoder(network, CLASSES, SHAPE, **options)


def task(name):
    L.seed_everything(1, verbose=False)
    options = {"input_shape": SHAPE, "channels_last": False, "optimizer": lambda p: torch.optim.SGD(p, lr=0.001)}
    if name == "PAT":
        flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        return PAT(flat, CLASSES, view="weak", average_decay=0.5, **options)
    le = {"lambda_cd": 1.0, "lambda_id": 1.0, "joint_classes": name == "L2D", "lambda_mld": 1.0}
    return L2D(small_tagger(), small_tagger(), CLASSES, **le, **options)


def stepped(name, devices):
    one = task(name)
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    trainer = trainer_of(max_epochs=1, precision="64-true", **options)
    data = Labels(batch_size=48 // devices)  # all training images in one step
    trainer.fit(one, datamodule=data)
    weights = {k: v.tolist() for k, v in one.state_dict().items() if v.numel() < 200}
    return weights, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/loss")}


@pytest.mark.parametrize("name", ["L2D", "PAT"])
def test_step_of_two_processes_equals_that_of_one(name):
    (first, loss), (second, _) = on_two_ranks(stepped, name, 2)
    alone, whole = stepped(name, 1)
    assert first.keys() == second.keys() == alone.keys()
    for key, values in alone.items():
        for found in (first[key], second[key]):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(values), rtol=1e-5, atol=1e-9, msg=key)
    assert loss == pytest.approx(whole, rel=1e-5)


def test_class_relations_stay_within_a_process_by_default():
    (_, loss), _ = on_two_ranks(stepped, "L2D of each", 2)
    _, whole = stepped("L2D of each", 1)
    assert loss["train/loss_id"] == pytest.approx(whole["train/loss_id"], rel=1e-5)
    assert loss["train/loss_cd"] != pytest.approx(whole["train/loss_cd"], rel=1e-2)
