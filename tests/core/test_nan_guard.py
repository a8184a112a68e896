import pytest
import torch

from lightning_kd.core.nan_guard import FiniteGuard


class Event:
    """A fake CUDA event: done once ``arrived`` is set, or after ``synchronize``."""

    def __init__(self):
        self.arrived = False

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = True


def test_infinite_loss_on_a_cpu_raises_at_its_step():
    guard = FiniteGuard()
    guard.record(("loss", "loss_ce"), torch.tensor([1.0, 1.0]), torch.zeros(2, 3), step=4, epoch=1)
    with pytest.raises(RuntimeError, match=r"at step 5 \(epoch 1\): loss inf, loss_ce 2, largest \|logit\| 7;"):
        guard.record(("loss", "loss_ce"), torch.tensor([float("inf"), 2.0]), torch.tensor([[-7.0, 3.0]]), 5, 1)
    guard.check(wait=True)  # reported only once


def test_pending_copy_is_checked_once_it_has_arrived():
    guard, event = FiniteGuard(), Event()
    guard._pending.append((torch.tensor([float("nan")]), event, ("loss",), torch.ones(1, 2), 3, 0))
    guard.record(("loss",), torch.tensor([1.0]), torch.ones(1, 2), 4, 0)
    event.arrived = True
    with pytest.raises(RuntimeError, match="at step 3 "):
        guard.record(("loss",), torch.tensor([1.0]), torch.ones(1, 2), 5, 0)


def test_check_with_wait_waits_for_pending_copies():
    guard = FiniteGuard()
    guard._pending.append((torch.tensor([float("nan")]), Event(), ("loss",), torch.ones(1, 2), 9, 2))
    with pytest.raises(RuntimeError, match=r"at step 9 \(epoch 2\)"):
        guard.check(wait=True)
