"""A row of values stored for each training sample."""

import pytest
import torch

from lightning_kd.core.sample_memory import SampleMemory
from tests.two_processes import on_two_ranks

CPU = torch.device("cpu")


def test_rows_are_written_by_index_without_gradient():
    memory = SampleMemory((2,), fill=0.5)
    memory.allocate(4, CPU)
    values = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    memory.write(torch.tensor([3, 1]), values * 2)
    assert memory.rows.tolist() == [[0.5, 0.5], [2, 2], [0.5, 0.5], [2, 2]]
    assert memory.rows.dtype == torch.float32
    assert not memory.rows.requires_grad
    assert memory.seen.tolist() == [False, True, False, True]
    memory.synchronise()
    assert not memory.seen.any()


def test_state_is_restored_and_one_of_another_size_raises():
    memory = SampleMemory((2,))
    memory.allocate(3, CPU)
    memory.write(torch.tensor([2]), torch.ones(1, 2))
    other = SampleMemory((2,))
    other.load_state_dict(memory.state_dict())
    other.allocate(3, CPU)
    assert torch.equal(other.rows, memory.rows)
    with pytest.raises(ValueError, match="has stored values of 3 training samples, the data has 5"):
        other.allocate(5, CPU)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\), expected \(7,\)"):
        SampleMemory((7,)).load_state_dict(memory.state_dict())


def _write_on_a_rank():
    import lightning as L

    class Write(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.memory = SampleMemory()
            self.memory.allocate(6, CPU)

        def training_step(self, batch, batch_idx):
            index = torch.tensor([0, 2] if self.global_rank == 0 else [1, 5, 4])
            self.memory.write(index, index.float() + 10)
            self.memory.synchronise()
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Write()
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, [0])
    return module.memory.rows.tolist()


def test_two_processes_exchange_the_rows_they_wrote():
    assert on_two_ranks(_write_on_a_rank) == [[10.0, 11.0, 12.0, 0.0, 14.0, 15.0]] * 2


def test_state_dict_is_a_copy():
    memory = SampleMemory((2,))
    memory.allocate(3, torch.device("cpu"))
    state = memory.state_dict()
    memory.write(torch.tensor([2]), torch.ones(1, 2))
    assert not state["rows"].any()
