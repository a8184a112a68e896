"""Fill a teacher store: compute the teacher's outputs for all views and write them, alone or with other processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kd.distillation._store_header import (
    StoreLayout,
    first_difference,
    header_path,
    read_header,
    read_marks,
)
from lightning_kd.distillation.soft_labels import compress
from lightning_kd.file_writing import disk_errors_naming, write_text

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["begin_store", "fill_store", "remove_store", "weights_digest"]

Views = tuple[Tensor, Tensor]

# seconds between two checks for pieces of other processes
PAUSE = 0.1


def remove_store(path: Path) -> None:
    """Delete the two files of a store, if they exist."""
    with disk_errors_naming(path):
        for each in (header_path(path), path):
            each.unlink(missing_ok=True)


def begin_store(path: Path, header: Mapping[str, Any]) -> None:
    """Create the two files of a store, or continue those that exist if their description is the same.

    Args:
        path: path of the store.
        header: content of ``PATH.json``.

    Raises:
        FileExistsError: if there is another store, or a file that is no store.
        ValueError: if the files are damaged.
        OSError: if the files cannot be written, or the disk has too little space.
    """
    file = header_path(path)
    layout = StoreLayout(header)
    there = file.is_file()
    if there:
        if (what := first_difference(_compared(read_header(path)), _compared(header))) is not None:
            raise FileExistsError(
                f"{path} holds other answers, {what}: name another file with --out, or delete them with --restart true"
            )
    elif path.exists() and not file.is_file():  # checked again: another process may just have created it
        raise FileExistsError(f"{path} exists and is no teacher store: name another file with --out")
    with disk_errors_naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise FileExistsError(
                f"{path} needs a folder where there is a file: name another file with --out"
            ) from None
        check_room(path, layout.size)
        if not there:
            write_text(file, json.dumps(header, indent=1) + "\n", durable=True)
        read_marks(path, layout)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(descriptor).st_size == 0:
                os.ftruncate(descriptor, layout.size)
        finally:
            os.close(descriptor)


def _compared(header: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a header that must be equal; of the weights file only the content, not the path."""
    return {**header, "reached": {}, "teacher": {**header["teacher"], "weights": None}}


def check_room(path: Path, size: int) -> None:
    """Raise an error if the disk has too little space for a file.

    Args:
        path: the file; space that it already occupies counts as free.
        size: size of the file in bytes.

    Raises:
        OSError: with the free space, if it is too little.
    """
    taken = getattr(path.stat(), "st_blocks", 0) * 512 if path.is_file() else 0
    free = shutil.disk_usage(path.parent).free
    if size - taken > free:
        raise OSError(
            f"{path} takes {size / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB left: make room, name another "
            "--out, or store less by --dtype float16, --compress marginal_smoothing_k5 or --views 16"
        )


class _Writer:
    """Writes pieces and their marks; a claimed piece is locked for other processes until it is released.

    The lock also ends if this process dies.
    """

    def __init__(self, path: Path, layout: StoreLayout) -> None:
        self.path, self.layout = path, layout
        # a single descriptor: closing another one of the same file would release all locks
        self._file = os.open(path, os.O_RDWR)

    def close(self) -> None:
        os.close(self._file)

    def done(self) -> np.ndarray:
        """Whether each piece is finished, bool ``[pieces]``."""
        return np.frombuffer(os.pread(self._file, self.layout.pieces, self.layout.marks), np.uint8) > 0

    @contextmanager
    def claimed(self, piece: int) -> Iterator[bool]:
        """Context in which a piece is locked; yields whether this process must compute it."""
        place, mine = self.layout.marks + piece, True
        if fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except BlockingIOError:
                mine = False
            except PermissionError:  # raised by some systems instead
                mine = False
            except OSError:  # a file system without locks: processes may compute pieces twice
                pass
        try:
            yield mine and not self.done()[piece]
        finally:
            if mine and fcntl is not None:
                with suppress(OSError):
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    def write(self, piece: int, answers: Mapping[str, Tensor]) -> None:
        """Write all values of a piece and, once they are on the disk, its mark."""
        first = self.layout.samples_of(piece).start * self.layout.keys
        with disk_errors_naming(self.path):
            for name, (dtype, width, start) in self.layout.fields.items():
                values = np.ascontiguousarray(answers[name].cpu().numpy().astype(dtype, copy=False))
                self._write(values.tobytes(), start + first * width * dtype.itemsize)
            os.fsync(self._file)
            self._write(b"\1", self.layout.marks + piece)

    def _write(self, content: bytes, place: int) -> None:
        while content:
            written = os.pwrite(self._file, content, place)
            content, place = content[written:], place + written


def fill_store(
    path: Path,
    header: Mapping[str, Any],
    logits: Callable[..., Tensor],
    *,
    images: Callable[[list[Views]], Iterable[Tensor]] | None = None,
    batch_size: int = 256,
    first: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
    beside: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
) -> int:
    """Compute and write pieces until all are finished; pieces that other processes work on are left to them.

    If a process is killed, its unfinished piece is computed by another process or by the next run.

    Args:
        path: a store for which ``begin_store`` was called.
        header: see ``begin_store``.
        logits: function to the teacher's logits ``[B, C]``, from samples ``[B]`` and views ``[B]`` (both int64), or
            from the images of a batch if ``images`` is given.
        images: function from a list of batches ``(samples [B], views [B])`` to the images of each, in their order, so
            that workers can make the next ones. Default: ``logits`` takes samples and views.
        batch_size: number of views per call of ``logits``.
        first: where this process starts among the pieces, from 0 to below 1; with different values processes rarely
            meet.
        progress: called with the number of finished pieces and the number of all.
        beside: function from samples ``[B]`` to further values that are stored for all their views, by name, see
            ``StoreLayout``.

    Returns:
        The number of pieces that this process has computed.

    Raises:
        ValueError: if the teacher's logits are not finite, also after conversion to the dtype of the store.
        OSError: if the file cannot be written.
    """
    layout = StoreLayout(header)
    order = np.roll(np.arange(layout.pieces), -int(first * layout.pieces))
    made, writer = 0, _Writer(path, layout)
    try:
        while not (done := writer.done()).all():
            before = made
            for piece in order[~done[order]].tolist():
                with writer.claimed(piece) as mine:
                    if mine:
                        answers = _outputs_of_piece(layout, header, piece, logits, images, batch_size)
                        samples = torch.from_numpy(layout.samples[layout.samples_of(piece)])
                        writer.write(piece, {**answers, **(beside(samples) if beside is not None else {})})
                        made += 1
                if mine and progress is not None:
                    progress(int(writer.done().sum()), layout.pieces)
            if made == before:
                time.sleep(PAUSE)  # other processes compute the remaining pieces
    finally:
        writer.close()
    if progress is not None:
        progress(layout.pieces, layout.pieces)
    return made


def _outputs_of_piece(
    layout: StoreLayout,
    header: Mapping[str, Any],
    piece: int,
    logits: Callable[..., Tensor],
    images: Callable[[list[Views]], Iterable[Tensor]] | None,
    batch_size: int,
) -> dict[str, Tensor]:
    samples = torch.from_numpy(layout.samples[layout.samples_of(piece)])
    index, key = samples.repeat_interleave(layout.keys), torch.arange(layout.keys).repeat(len(samples))
    batches: list[Views] = list(zip(index.split(batch_size), key.split(batch_size), strict=True))
    inputs = batches if images is None else ((image,) for image in images(batches))
    parts = [_stored_values(logits(*each), header) for each in inputs]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _stored_values(logits: Tensor, header: Mapping[str, Any]) -> dict[str, Tensor]:
    kind, dtype = header["answers"], getattr(torch, header["dtype"])
    if logits.ndim != 2 or logits.shape[1] != header["num_classes"]:
        raise ValueError(
            f"a store holds logits [B, {header['num_classes']}], the teacher gives {list(logits.shape)}: a "
            "store does not support this kind of problem"
        )
    values = logits.float()
    kept = {"logits": values.to(dtype)}
    if kind != "logits":
        index, probability = compress((values / header["temperature"]).softmax(1), kind)
        kept = {"index": index} if probability is None else {"index": index, "probability": probability.to(dtype)}
    if not all(part.isfinite().all() for part in (values, *kept.values())):
        raise ValueError(
            f"the teacher's logits are not finite in {header['dtype']}: check teacher_weights and the normalisation, "
            "or store them as --dtype float32"
        )
    return kept


def weights_digest(network: nn.Module) -> str:
    """The SHA-256 of a network's parameters and buffers, with their names."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        content = value.detach().cpu().contiguous()
        found.update(f"{name} {content.dtype} {tuple(content.shape)}\n".encode())
        found.update(content.flatten().view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    return found.hexdigest()
