"""Learning rate schedules against the values of the papers."""

import math

import pytest
import torch

from lightning_kd.core.schedules import ConstantThenCosine


def rates(count, resume_at=None, **arguments):
    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.04)
        return optimizer, ConstantThenCosine(optimizer, **arguments)

    optimizer, scheduler = build()
    values = []
    for epoch in range(count):
        if epoch == resume_at:
            kept = optimizer.state_dict(), scheduler.state_dict()
            optimizer, scheduler = build()
            optimizer.load_state_dict(kept[0])
            scheduler.load_state_dict(kept[1])
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_constant_then_cosine_has_the_papers_rates_and_resumes():
    values = rates(330, constant_epochs=20, cosine_epochs=300, eta_min=2e-4)
    assert values[:21] == [0.04] * 21
    assert values[21] == pytest.approx(2e-4 + 0.0398 * (1 + math.cos(math.pi / 300)) / 2, abs=1e-12)
    assert values[170] == pytest.approx(0.0201, abs=1e-12)
    assert values[319] == pytest.approx(2.0109e-4, abs=1e-8)
    assert values[320:] == [pytest.approx(2e-4)] * 10
    assert values == rates(330, resume_at=100, constant_epochs=20, cosine_epochs=300, eta_min=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"constant_epochs": -1, "cosine_epochs": 3}, "constant_epochs must be at least 0, got -1"),
        ({"constant_epochs": 1, "cosine_epochs": 0}, "cosine_epochs must be at least 1, got 0"),
    ],
)
def test_wrong_lengths_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **arguments)
