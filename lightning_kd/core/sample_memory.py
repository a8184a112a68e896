"""Values that a method stores for every training sample, by its index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_kd.core.distributed import gather_by_index
from lightning_kd.core.two_pass_step import second_pass


class SampleMemory:
    """A table with a row for each sample of the training array.

    It is stored in checkpoints, but not in the ``state_dict``, because its size is known only when there is data. Every
    process has its own copy. As each sample is on one process in an epoch, ``synchronise`` at the end of the epoch is
    enough.

    Args:
        shape: shape of one row.
        fill: the initial value.
        dtype: dtype of the rows.
        on_host: keep the rows in the host's memory, if they are too large for a GPU; each batch then waits for a copy.

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
        """Allocate rows for ``count`` samples if there are none; move the rows to ``device`` unless ``on_host``.

        Raises:
            ValueError: if there are rows for another number of samples.
        """
        device = torch.device("cpu") if self.on_host else device
        if len(self.rows) == 0:
            self.rows = torch.full((count, *self.shape), self.fill, dtype=self.dtype)
        if len(self.rows) != count:
            raise ValueError(
                f"the checkpoint has stored values of {len(self.rows)} training samples, the data has {count}: go on "
                "with the data that the run was started with"
            )
        self.rows = self.rows.to(device)
        self.seen = torch.zeros(count, dtype=torch.bool, device=device)

    def read(self, index: Tensor) -> Tensor:
        """The rows ``[B, *shape]`` of the samples ``index`` int64 ``[B]``, on the device of ``index``."""
        return self.rows[index.to(self.rows.device)].to(index.device)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Replace the rows of ``index`` int64 ``[B]`` by ``rows`` ``[B, *shape]``, without gradient.

        The second evaluation of a batch by an optimizer such as SAM writes nothing.
        """
        if second_pass():
            return
        index = index.to(self.rows.device)
        self.rows[index] = rows.detach().to(self.rows)
        self.seen[index] = True

    def synchronise(self) -> None:
        """Give every process the rows that the others wrote; all processes must call it."""
        index = self.seen.nonzero().squeeze(1)
        index, rows = gather_by_index(index, self.rows[index])
        self.rows[index.to(self.rows.device)] = rows.to(self.rows.device)
        self.seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The state as a checkpoint stores it: a copy of the rows on the CPU."""
        return {"rows": self.rows.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows from a checkpoint.

        Raises:
            ValueError: if its rows have another shape.
        """
        rows = state["rows"]
        if tuple(rows.shape[1:]) != self.shape and len(rows):
            raise ValueError(
                f"the checkpoint has stored rows of shape {tuple(rows.shape[1:])}, expected {self.shape}: use the "
                "method's arguments and the classes of the run"
            )
        self.rows = rows.to(self.rows.device, self.dtype)
        self.seen = torch.zeros(len(rows), dtype=torch.bool, device=self.rows.device)
