"""Logits are found in whatever a network returns: tensor, tuple, dict or object."""

from types import SimpleNamespace
from typing import NamedTuple

import lightning as L
import pytest
import torch
from torch import nn

from lightning_kd import (
    BLDR,
    BUAL,
    DCFS,
    DHKD,
    DPC,
    KD,
    Classification,
    CoTeaching,
    DigitsDataModule,
    ELRPlus,
    LfOSA,
    PoolClassifier,
)
from lightning_kd.core.outputs import class_logits, logits_of
from lightning_kd.flatness import OptimumShifting
from tests.active_learning.runs import pool_data

LOGITS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
AUXILIARY = torch.zeros(2, 2)


class Outputs(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


class ModelOutput(dict):
    """Like Hugging Face's: a dict whose entries are attributes too."""

    __getattr__ = dict.__getitem__


KINDS = {
    "tensor": lambda logits: logits,
    "tuple": lambda logits: (logits, AUXILIARY),
    "list": lambda logits: [logits],
    "named": lambda logits: Outputs(logits, AUXILIARY),
    "logits": lambda logits: {"logits": logits, "hidden": AUXILIARY},
    "out": lambda logits: {"aux": AUXILIARY, "out": logits},
    "model_output": lambda logits: ModelOutput(loss=None, logits=logits),
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_found_in_every_kind_of_output(kind):
    assert logits_of(KINDS[kind](LOGITS)) is LOGITS


@pytest.mark.parametrize("output", [None, (), {"aux": LOGITS}, [[LOGITS]], SimpleNamespace(x=1), 3.0])
def test_output_without_logits_raises_with_its_type(output):
    with pytest.raises(TypeError, match=f"must return logits .* got {type(output).__name__}"):
        logits_of(output)


@pytest.mark.parametrize("logits", [LOGITS[0], LOGITS[None], LOGITS[:, :1]])
def test_logits_of_another_shape_raise(logits):
    with pytest.raises(ValueError, match=r"Linear gives \[.*\], expected \[B, 2\]"):
        class_logits(nn.Linear(2, 2), {"out": logits}, 2)


class Foreign(nn.Module):
    """A small convolutional network whose output is of the given kind."""

    def __init__(self, kind="tensor", classes=10):
        super().__init__()
        self.kind = kind
        self.layer1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(4))
        self.head = nn.Linear(16, classes)

    def forward(self, image):
        return KINDS[self.kind](self.head(self.layer2(self.layer1(image)).flatten(1)))


PAIRS = {"KD": (KD, {}), "DHKD": (DHKD, {"auxiliary_head": "nonlinear", "gradient_alignment": "all"})}
SINGLES = {
    "Classification": (Classification, {}, 10),
    "DPC": (DPC, {"warmup_epochs": 1}, 10),
    "CoTeaching": (CoTeaching, {"noise_rate": 0.2}, 10),
    "ELRPlus": (ELRPlus, {}, 10),
    "BLDR": (BLDR, {"warmup_epochs": 1}, 10),
    "LfOSA": (LfOSA, {}, 4),
    "DCFS": (DCFS, {}, 4),
    "BADGE": (PoolClassifier, {"strategy": "badge"}, 4),
    "BUAL": (BUAL, {"negative_epochs": 1, "snapshot_interval": 1, "subset_size": 20}, 4),
}


def trained(name, kind):
    """All weights of a method after two short epochs with networks of this kind of output."""
    L.seed_everything(0, verbose=False)
    if name in PAIRS:
        method, options = PAIRS[name]
        task = method(Foreign(kind), Foreign(kind), num_classes=10, input_shape=(1, 8, 8), **options)
        data = DigitsDataModule(fake=True, batch_size=32)
    else:
        method, options, classes = SINGLES[name]
        task = method(Foreign(kind, classes), num_classes=classes, input_shape=(1, 8, 8), **options)
        data = pool_data() if classes == 4 else DigitsDataModule(fake=True, batch_size=32)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        limit_train_batches=3,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OptimumShifting(guard=None)] if name == "Classification" else None,
    )
    trainer.fit(task, data)
    return torch.cat([value.double().flatten() for value in task.state_dict().values()])


@pytest.mark.parametrize("name", [*PAIRS, *SINGLES])
def test_methods_train_the_same_whatever_their_networks_return(name):
    plain = trained(name, "tensor")
    for kind in ("tuple", "model_output"):
        assert torch.equal(trained(name, kind), plain)
