"""The files that rounds leave, to be removed, unless a person was asked anything in there."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_kd.core.run_folder import RunFolder, remove_files
from lightning_kd.pool import PoolRecord
from lightning_kd.pool.pool_record import missing_rows

__all__ = ["asked_by_hand", "files_of_rounds", "remove_round"]


def asked_by_hand(record: PoolRecord) -> bool:
    """Whether some of its questions were for a person."""
    ours = {row["round"] for row in record.results if "final" in row}
    return any(row["by"] == "person" or row["round"] not in ours for row in record.queries)


def files_of_rounds(folder: Path) -> list[Path]:
    """What ``run_rounds`` left in ``folder``: ``pool.json`` first, so that it never tells of rounds that are gone.

    Raises:
        FileExistsError: where a person was asked anything in there, or where no ``run.json`` tells that this is a run.
    """
    top = [path for name in ("pool.json", "metrics.csv", "curves.png") if (path := folder / name).is_file()]
    if top and RunFolder(folder).read_record() is None:
        raise FileExistsError(
            f"{folder} holds {', '.join(path.name for path in top)} but no run.json, so that they may be somebody's "
            "own: --overwrite removes only what a run wrote; move them elsewhere, or name another --run folder"
        )
    rounds = [path for path in sorted(folder.glob("round_*")) if _is_round(path)]
    for own in (path / "pool.json" for path in (folder, *rounds)):
        if own.is_file() and asked_by_hand(PoolRecord.load(own)):
            raise FileExistsError(f"{own} holds questions to a person, which would be lost: name another --run folder")
    return [*top, *(file for path in rounds for file in _files_of(path))]


def remove_round(folder: Path, whole: PoolRecord) -> None:
    """Remove what a round left in its folder.

    Args:
        folder: of the round.
        whole: the record of all rounds.

    Raises:
        FileExistsError: where it holds a query that ``active`` did not make, or such files without being a round.
    """
    own = folder / "pool.json"
    if own.is_file() and any(row["by"] != "oracle" for row in missing_rows(PoolRecord.load(own), whole)):
        raise FileExistsError(f"{own} holds questions that were asked by hand: move {folder} elsewhere first")
    files = [path for path in _files_of(folder) if path.is_file()]
    if files and not _is_round(folder):
        raise FileExistsError(f"{folder} is of no round of a run: move it elsewhere, or name another --run folder")
    remove_files(folder.parent, files)


def _is_round(folder: Path) -> bool:
    named = re.fullmatch(r"round_\d\d+", folder.name) is not None
    # the pool of a round is there before its run.json
    return named and ((folder / "pool.json").is_file() or RunFolder(folder).read_record() is not None)


def _files_of(folder: Path) -> list[Path]:
    run = RunFolder(folder)
    return [*run.written(), folder / "config.yaml", run.pool, run.record_file]
