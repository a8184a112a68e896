"""Moving averages of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_kd.core.averaging import averaged_copy, update_average


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def train(module: nn.Module) -> None:
    """Change parameters, running statistics and batch counters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    module.train()(torch.randn(5, 3))


@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
def test_average_follows_the_decay_and_the_buffer_mode(buffers: str) -> None:
    trained = network()
    average = averaged_copy(trained)
    assert average is not trained
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    expected = {name: value.clone() for name, value in trained.state_dict().items()}
    of_parameters = {name for name, _ in trained.named_parameters()}
    for decay in (0.9, 0.3, 0.0):
        train(trained)
        update_average(average, trained, decay, buffers)
        for name, value in trained.state_dict().items():
            if name in of_parameters or (buffers == "average" and value.is_floating_point()):
                expected[name] = decay * expected[name] + (1 - decay) * value
            elif buffers != "keep":
                expected[name] = value.clone()
        torch.testing.assert_close(average.state_dict(), expected)
    assert torch.equal(average[0].weight, trained[0].weight)  # decay 0 copies to the bit
    assert average[1].num_batches_tracked.item() == (0 if buffers == "keep" else 3)


def test_decay_one_leaves_the_average_unchanged() -> None:
    trained = network()
    average = averaged_copy(trained)
    before = average[0].weight.clone()
    train(trained)
    update_average(average, trained, 1.0)
    assert torch.equal(average[0].weight, before)


def test_shared_weights_stay_shared_and_are_averaged_once() -> None:
    trained = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    trained[1].weight = trained[0].weight
    average = averaged_copy(trained)
    assert average[1].weight is average[0].weight
    with torch.no_grad():
        trained[0].weight.add_(1)
    expected = average[0].weight + 0.5
    update_average(average, trained, 0.5)
    torch.testing.assert_close(average[1].weight, expected)


def test_wrong_decay_buffers_and_network_raise() -> None:
    trained = network()
    average = averaged_copy(trained)
    with pytest.raises(ValueError, match=r"^decay must be at least 0 and at most 1, got 1\.5"):
        update_average(average, trained, 1.5)
    with pytest.raises(ValueError, match=r"^buffers must be 'copy', 'average' or 'keep', got 'none'"):
        update_average(average, trained, 0.5, "none")
    with pytest.raises(ValueError, match=r"^average and network differ in their tensors"):
        update_average(average, nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), 0.5)
