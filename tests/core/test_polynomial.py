"""Polynomial decay of the learning rate: equal to torch's, exact first rate, and resume."""

import pytest
import torch
from torch.optim.lr_scheduler import PolynomialLR

from lightning_kd.core.polynomial import PolynomialDecay
from tests.core.test_warmup import of_length, rates


def test_polynomial_decay_equals_torchs():
    own = rates(lambda optimizer: PolynomialDecay(optimizer, 20), 24)
    expected = rates(lambda optimizer: PolynomialLR(optimizer, 20, 0.9), 24)
    for pair, other in zip(own, expected, strict=True):
        assert pair == pytest.approx(other, abs=1e-9)
    assert own[0] == [0.1, 0.01]
    assert own[20:] == [[0.0, 0.0]] * 4
    line = rates(lambda optimizer: PolynomialDecay(optimizer, 4, power=1.0), 4)
    assert [pair[0] for pair in line] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_length_can_be_set_later_and_resume_continues():
    def make(optimizer):
        return of_length(PolynomialDecay(optimizer), 15)

    whole = rates(make, 15)
    assert rates(make, 15, 7) == whole
    assert whole[5][0] == pytest.approx(0.1 * (2 / 3) ** 0.9)


@pytest.mark.parametrize(("name", "value"), [("total_steps", 0), ("total_steps", 1.5), ("power", 0.0)])
def test_wrong_numbers_raise(name, value):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        PolynomialDecay(optimizer, **{name: value})
