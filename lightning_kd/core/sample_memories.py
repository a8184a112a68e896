"""A base class for methods that store values for every training sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_kd.core.batch import Batch
from lightning_kd.core.sample_memory import SampleMemory
from lightning_kd.core.task import Task

__all__ = ["SampleMemories"]


class SampleMemories(Task):
    """A ``Task`` that stores values for every training sample, by its index, also in checkpoints.

    Memories are allocated when training starts. At the end of every epoch processes exchange the rows they wrote.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memories: dict[str, SampleMemory] = {}

    @property
    def data(self) -> Any:
        """The data module of lightning_kd that the task trains on.

        Raises:
            ValueError: if the Trainer has another data module, or none.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "train_indices") or not hasattr(data, "loader"):
            raise ValueError(
                f"{type(self).__name__} chooses which training samples it reads, got a plain loader: give your data in "
                "a data module, for example ArrayDataModule or ImageFolderDataModule"
            )
        return data

    def sample_count(self) -> int:
        """Size of the full training array, in which the indices of batches are positions.

        Raises:
            ValueError: if neither the data module nor the loader's dataset has a length.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "train_target"):
            return len(data.train_target)
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "dataset") and hasattr(loader.dataset, "__len__"):
            return len(loader.dataset)
        raise ValueError(
            f"{type(self).__name__} stores values for every sample and needs their number, got "
            f"{type(loader).__name__}: use a data module of lightning_kd, or a DataLoader that yields (image, target, "
            "index)"
        )

    def add_sample_memory(
        self, name: str, shape: tuple[int, ...] = (), fill: float = 0.0, **kwargs: Any
    ) -> SampleMemory:
        """Add a memory with a row for every sample, stored in checkpoints under ``name``; call it in ``__init__``.

        Args:
            name: name of the memory.
            shape: see ``SampleMemory``, as the others.
            fill: likewise.
            kwargs: likewise.
        """
        self.memories[name] = SampleMemory(shape, fill, **kwargs)
        return self.memories[name]

    def index_of(self, batch: Batch) -> Tensor:
        """The indices of the batch, int64 ``[B]``.

        Raises:
            ValueError: if it has none, or (checked on a CPU alone) one is out of range.
        """
        if batch.index is None:
            raise ValueError(
                f"{type(self).__name__} stores values for every sample, but the batch has no index: use a data module "
                "of lightning_kd, or let your DataLoader yield (image, target, index)"
            )
        count = min((len(memory.rows) for memory in self.memories.values()), default=0)
        if count and batch.index.device.type == "cpu" and int(batch.index.max()) >= count:
            raise ValueError(
                f"index must be below {count}, the size of the training set, got {int(batch.index.max())}: let the "
                "loader yield positions in the data set that it was made from"
            )
        return batch.index

    def on_train_start(self) -> None:
        super().on_train_start()
        for memory in self.memories.values():  # does not change rows that a checkpoint has restored
            memory.allocate(self.sample_count(), self.device)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        for memory in self.memories.values():
            memory.synchronise()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["memories"] = {name: memory.state_dict() for name, memory in self.memories.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, state in checkpoint.get("memories", {}).items():
            if name in self.memories:
                self.memories[name].load_state_dict(state)
