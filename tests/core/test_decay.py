"""Weight decay of weights only (``decay_weights_only``)."""

from functools import partial

import pytest
import torch

from lightning_kd.core import Classification


def test_biases_and_norms_get_no_weight_decay():
    adam = partial(torch.optim.Adam, lr=0.1, weight_decay=0.5)
    task = Classification("cnn_tiny", 3, optimizer=adam, decay_weights_only=True)
    optimizer = task.configure_optimizers()
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(task.network.parameters()))
    assert len(Classification("cnn_tiny", 3, optimizer=adam).configure_optimizers().param_groups) == 1
    with pytest.raises(ValueError, match=r"^decay_weights_only excludes backbone_lr=0.1"):
        Classification("cnn_tiny", 3, decay_weights_only=True, backbone_lr=0.1)
