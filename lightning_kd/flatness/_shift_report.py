"""What a shift did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class LayerShift:
    """One layer of a shift.

    Attributes:
        name: its module path.
        mode: ``"fixed"``, ``"joint"`` or ``"free"``.
        rows: how many inputs it was shifted on, over all processes.
        dim: of one input.
        rank: of the inputs; a list for a grouped convolution.
        status: ``"shifted"`` or ``"identity"``.
        norm_before: Frobenius norm of the weight.
        norm_after: likewise, of the shifted one, whether or not it was undone.
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
    """What ``shift_network`` did; ``str`` of it is a table.

    Attributes:
        layers: one entry a layer.
        samples: in the shift set, over all processes.
        loss_before: mean loss on the shift set; ``None`` where it has no targets.
        loss_after: likewise, after the shift, whether or not it was undone.
        held_out_before: mean loss on the held-out samples; ``None`` without them.
        held_out_after: likewise.
        kappa_before: relative flatness of the classifier on the shift set; ``None`` where it was not among the
            layers, or samples have more than one class.
        kappa_after: likewise.
        undone: whether everything is as it was before the shift.
        reason: why, empty where it is not.
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
        """Whether no layer moved."""
        return all(layer.status == "identity" for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON and checkpoints."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The numbers under the names that they are logged by."""
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
        """One line."""
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
