"""The report of an optimum shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class LayerShift:
    """What a shift did to one layer.

    Attributes:
        name: module path of the layer.
        mode: ``"fixed"``, ``"joint"`` or ``"free"``.
        rows: number of inputs that it was shifted on, over all processes.
        dim: dimension of an input.
        rank: numerical rank of the inputs; a list for a grouped convolution.
        status: ``"shifted"``, or ``"identity"`` if the inputs span the whole space, so that nothing changed.
        norm_before: Frobenius norm of the weight before the shift.
        norm_after: Frobenius norm of the shifted weight, even if the shift was undone.
    """

    name: str
    mode: str
    rows: int
    dim: int
    rank: int | list[int]
    status: str
    norm_before: float
    norm_after: float


@dataclass
class ShiftReport:
    """What ``shift_network`` did; ``str(report)`` is a table.

    Values "after" are those of the shifted network, even if the shift was undone.

    Attributes:
        layers: one entry for each layer.
        samples: number of samples that were shifted on, over all processes.
        loss_before: mean loss on these samples; ``None`` if they have no targets.
        loss_after: mean loss on them after the shift.
        held_out_before: mean loss on the held-out samples; ``None`` without them.
        held_out_after: mean loss on them after the shift.
        kappa_before: relative flatness of the classifier on the samples; ``None`` if it is not among the layers, or if
            samples have several classes.
        kappa_after: relative flatness after the shift.
        undone: whether the shift was undone, so that the network is as before.
        reason: why it was undone; empty otherwise.
    """

    layers: list[LayerShift]
    samples: int
    loss_before: float | None = None
    loss_after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    kappa_before: float | None = None
    kappa_after: float | None = None
    undone: bool = False
    reason: str = ""

    @property
    def identity(self) -> bool:
        """Whether no layer changed."""
        return all(layer.status == "identity" for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict of plain values, for JSON and checkpoints."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The numbers under the names by which they are logged, ``shift/...``."""
        metrics: dict[str, float] = {"identity": float(self.identity), "undone": float(self.undone)}
        for layer in self.layers:
            end = f"/{layer.name}" if len(self.layers) > 1 else ""
            metrics[f"norm_ratio{end}"] = layer.norm_after / layer.norm_before if layer.norm_before else 1.0
            metrics[f"rank{end}"] = float(layer.rank if isinstance(layer.rank, int) else min(layer.rank))
        for name in ("loss", "held_out", "kappa"):
            for when in ("before", "after"):
                value = getattr(self, f"{name}_{when}")
                if value is not None:
                    metrics[f"{name}_{when}"] = value
        return {f"shift/{name}": value for name, value in metrics.items()}

    def summary(self) -> str:
        """The report in one line."""
        parts = []
        for layer in self.layers:
            ratio = layer.norm_after / layer.norm_before if layer.norm_before else 1.0
            parts.append(f"layer {layer.name!r} rank {_rank(layer.rank)} of {layer.dim}, norm x {ratio:.4f}")
        for name, before, after in self._pairs():
            if before is not None and after is not None:
                parts.append(f"{name} {before:.4g} -> {after:.4g}")
        outcome = f"undone ({self.reason})" if self.undone else "identity" if self.identity else "shifted"
        return f"{outcome}: {'; '.join(parts)}"

    def _pairs(self) -> list[tuple[str, float | None, float | None]]:
        return [
            ("loss", self.loss_before, self.loss_after),
            ("held-out loss", self.held_out_before, self.held_out_after),
            ("kappa", self.kappa_before, self.kappa_after),
        ]

    def __str__(self) -> str:
        table = [("layer", "mode", "rows", "dim", "rank", "status", "norm before", "norm after")]
        for layer in self.layers:
            norms = (f"{layer.norm_before:.6g}", f"{layer.norm_after:.6g}")
            row = (layer.name, layer.mode, str(layer.rows), str(layer.dim), _rank(layer.rank), layer.status, *norms)
            table.append(row)
        lines = _aligned(table)
        numbers = [("", "before", "after")]
        for name, before, after in self._pairs():
            if before is not None:
                numbers.append((name, f"{before:.6g}", "-" if after is None else f"{after:.6g}"))
        if len(numbers) > 1:
            lines += ["", *_aligned(numbers)]
        lines += ["", f"{self.samples} samples; " + (f"undone: {self.reason}" if self.undone else "kept")]
        return "\n".join(lines)


def _rank(rank: int | list[int]) -> str:
    if isinstance(rank, int):
        return str(rank)
    low, high = min(rank), max(rank)
    return f"{low}" if low == high else f"{low}-{high}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines
