import pytest
import torch

from lightning_kd.core.nan_guard import FiniteGuard


class Event:
    """A copy on its way: arrives when told, or when waited for."""

    def __init__(self):
        self.arrived = False

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = True


def test_on_a_cpu_the_step_itself_raises():
    guard = FiniteGuard()
    guard.record(("loss", "loss_ce"), torch.tensor([1.0, 1.0]), torch.zeros(2, 3), step=4, epoch=1)
    with pytest.raises(RuntimeError, match=r"at step 5 \(epoch 1\): loss inf, loss_ce 2, largest \|logit\| 7;"):
        guard.record(("loss", "loss_ce"), torch.tensor([float("inf"), 2.0]), torch.tensor([[-7.0, 3.0]]), 5, 1)
    guard.check(wait=True)  # told once


def test_copies_on_their_way_hold_nobody_up():
    guard, event = FiniteGuard(), Event()
    guard._pending.append((torch.tensor([float("nan")]), event, ("loss",), torch.ones(1, 2), 3, 0))
    guard.record(("loss",), torch.tensor([1.0]), torch.ones(1, 2), 4, 0)
    event.arrived = True
    with pytest.raises(RuntimeError, match="at step 3 "):
        guard.record(("loss",), torch.tensor([1.0]), torch.ones(1, 2), 5, 0)


def test_the_epoch_ends_only_once_all_is_known():
    guard = FiniteGuard()
    guard._pending.append((torch.tensor([float("nan")]), Event(), ("loss",), torch.ones(1, 2), 9, 2))
    with pytest.raises(RuntimeError, match=r"at step 9 \(epoch 2\)"):
        guard.check(wait=True)
