"""What a method remembers of every training sample, found by its index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.two_pass_step import second_pass


class SampleMemory:
    """A row of numbers for each sample of the training array.

    It is part of checkpoints, but of no ``state_dict``: its size is known only once there is data. Every process works
    on its own copy; a sample is on one process an epoch, so that ``synchronise`` at the end of an epoch is enough.

    Args:
        shape: of one row.
        fill: the value at the start.
        dtype: of the rows.
        on_host: keep the rows in the host's memory, where a GPU has no room for them; each batch then waits for them.

    Attributes:
        rows: ``[N, *shape]``; empty before ``allocate``.
        seen: bool ``[N]``, which samples were written since the last ``synchronise``.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (),
        fill: float = 0.0,
        dtype: torch.dtype = torch.float32,
        on_host: bool = False,
    ) -> None:
        self.shape = shape
        self.fill = fill
        self.dtype = dtype
        self.on_host = on_host
        self.rows = torch.empty((0, *shape), dtype=dtype)
        self.seen = torch.zeros(0, dtype=torch.bool)

    def allocate(self, count: int, device: torch.device) -> None:
        """Make room for ``count`` samples, unless there is; what is kept moves to ``device``, but for ``on_host``.

        Raises:
            ValueError: if it holds another number of samples.
        """
        device = torch.device("cpu") if self.on_host else device
        if len(self.rows) == 0:
            self.rows = torch.full((count, *self.shape), self.fill, dtype=self.dtype)
        if len(self.rows) != count:
            raise ValueError(
                f"the checkpoint remembers {len(self.rows)} training samples, the data has {count}: go on with the "
                "data that the run was started on"
            )
        self.rows = self.rows.to(device)
        self.seen = torch.zeros(count, dtype=torch.bool, device=device)

    def read(self, index: Tensor) -> Tensor:
        """The rows of ``index`` int64 ``[B]``, ``[B, *shape]``, on its device."""
        return self.rows[index.to(self.rows.device)].to(index.device)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Replace the rows of ``index`` int64 ``[B]`` by ``rows`` ``[B, *shape]``, without gradient.

        Nothing is written in the second evaluation of a batch by an optimizer such as SAM.
        """
        if second_pass():
            return
        index = index.to(self.rows.device)
        self.rows[index] = rows.detach().to(self.rows)
        self.seen[index] = True

    def synchronise(self) -> None:
        """Give every process the rows that the others wrote; collective."""
        index = self.seen.nonzero().squeeze(1)
        index, rows = gather_by_index(index, self.rows[index])
        self.rows[index.to(self.rows.device)] = rows.to(self.rows.device)
        self.seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The rows, on the CPU."""
        return {"rows": self.rows.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows of a checkpoint.

        Raises:
            ValueError: if its rows have another shape.
        """
        rows = state["rows"]
        if tuple(rows.shape[1:]) != self.shape and len(rows):
            raise ValueError(
                f"the checkpoint remembers rows of shape {tuple(rows.shape[1:])}, expected {self.shape}: keep the "
                "method's arguments and the classes of the run"
            )
        self.rows = rows.to(self.rows.device, self.dtype)
        self.seen = torch.zeros(len(rows), dtype=torch.bool, device=self.rows.device)
