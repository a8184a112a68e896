"""Removing the folders of rounds, unless a person was asked anything in there."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_kd.pool import PoolRecord
from lightning_kd.pool.pool_record import missing_rows


def asked_by_hand(record: PoolRecord) -> bool:
    """Whether some of its questions were for a person."""
    ours = {row["round"] for row in record.results if "final" in row}
    return any(row["by"] == "person" or row["round"] not in ours for row in record.queries)


def forget_rounds(folder: Path) -> None:
    """Remove what ``run_rounds`` left in ``folder``.

    Raises:
        FileExistsError: where a person was asked anything in there; nothing is removed then.
    """
    file = folder / "pool.json"
    rounds = sorted(folder.glob("round_[0-9]*"))
    for own in [file, *(path / "pool.json" for path in rounds)]:
        if own.is_file() and asked_by_hand(PoolRecord.load(own)):
            raise FileExistsError(f"{own} holds questions to a person, which would be lost: name another --run folder")
    file.unlink(missing_ok=True)  # first, so that it never tells of rounds that are gone
    for path in rounds:
        shutil.rmtree(path)
    for name in ("metrics.csv", "curves.png"):
        (folder / name).unlink(missing_ok=True)


def remove_round(folder: Path, whole: PoolRecord) -> None:
    """Remove the folder of a round.

    Args:
        folder: of the round.
        whole: the record of all rounds.

    Raises:
        FileExistsError: where it holds a query that ``active`` did not make.
    """
    own = folder / "pool.json"
    if own.is_file() and any(row["by"] != "oracle" for row in missing_rows(PoolRecord.load(own), whole)):
        raise FileExistsError(f"{own} holds questions that were asked by hand: move {folder} elsewhere first")
    shutil.rmtree(folder, ignore_errors=True)
