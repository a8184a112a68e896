"""Counting the random draws between two generator states, and skipping as many."""

import pytest
import torch

from lightning_kd.core.random_draws import count_draws, skip_draws
from lightning_kd.nets import build_network


@pytest.mark.parametrize("before", [0, 1, 623, 624, 1000])
@pytest.mark.parametrize("count", [0, 1, 5, 623, 624, 625, 5000])
def test_draws_are_counted_from_any_generator_state(before, count):
    torch.manual_seed(3)
    torch.empty(before).uniform_()
    first = torch.get_rng_state()
    torch.empty(count).uniform_()  # of 32 bits each
    assert count_draws(first, torch.get_rng_state()) == count


@pytest.mark.parametrize("name", ["cnn", "resnet8", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_skipping_a_networks_draws_advances_the_generator_as_building_it(name):
    torch.manual_seed(0)
    torch.empty(77).uniform_()
    before = torch.get_rng_state()
    build_network(name, 10)
    count = count_draws(before, torch.get_rng_state())
    expected = torch.randn(20)
    torch.manual_seed(9)
    torch.empty(1).uniform_()
    build_network(name, 10)
    other = torch.randn(20)
    torch.manual_seed(0)
    torch.empty(77).uniform_()
    skip_draws(count)
    assert torch.equal(torch.randn(20), expected)
    torch.manual_seed(9)  # the same count from another state
    torch.empty(1).uniform_()
    skip_draws(count)
    assert torch.equal(torch.randn(20), other)


def test_states_of_different_seeds_give_no_count(monkeypatch):
    monkeypatch.setattr("lightning_kd.core.random_draws.MOST", 10_000)
    one, two = (torch.Generator().manual_seed(k).get_state() for k in range(2))
    assert count_draws(one, two) is None
