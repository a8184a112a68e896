"""Removing the files that earlier rounds of ``lightning-kd active`` wrote; queries to a person are never removed."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_kd.core.run_folder import RunFolder, remove_files
from lightning_kd.pool import PoolRecord
from lightning_kd.pool.pool_record import missing_rows

__all__ = ["asked_by_hand", "files_of_rounds", "remove_round"]


def asked_by_hand(record: PoolRecord) -> bool:
    """Whether ``record`` has a query that a person answers: one that ``run_rounds`` did not make for the oracle."""
    by_oracle = {row["round"] for row in record.results if "final" in row}
    return any(row["by"] == "person" or row["round"] not in by_oracle for row in record.queries)


def files_of_rounds(folder: Path) -> list[Path]:
    """The files that ``run_rounds`` wrote below ``folder``, in the order to remove them.

    ``pool.json`` is first: where the removal is interrupted, no record is left of rounds whose files are gone.

    Raises:
        FileExistsError: if a ``pool.json`` holds a query to a person, or if no ``run.json`` shows that ``folder`` is a
            run folder.
    """
    top = [path for name in ("pool.json", "metrics.csv", "curves.png") if (path := folder / name).is_file()]
    if top and RunFolder(folder).read_record() is None:
        raise FileExistsError(
            f"{folder} holds {', '.join(path.name for path in top)} but no run.json, so no run may have written them: "
            "--overwrite removes only what a run wrote; move them elsewhere, or name another --run folder"
        )
    rounds = [path for path in sorted(folder.glob("round_*")) if _is_round(path)]
    for own in (path / "pool.json" for path in (folder, *rounds)):
        if own.is_file() and asked_by_hand(PoolRecord.load(own)):
            raise FileExistsError(f"{own} holds queries to a person, which would be lost: name another --run folder")
    return [*top, *(file for path in rounds for file in _files_of(path))]


def remove_round(folder: Path, whole: PoolRecord) -> None:
    """Remove the files of an interrupted round, so that it can be trained again.

    Args:
        folder: the folder of the round, ``RUN/round_NN``.
        whole: the record of all rounds, ``RUN/pool.json``.

    Raises:
        FileExistsError: if the folder holds a query that ``lightning-kd active`` did not make, or such files without
            being the folder of a round.
    """
    own = folder / "pool.json"
    if own.is_file() and any(row["by"] != "oracle" for row in missing_rows(PoolRecord.load(own), whole)):
        raise FileExistsError(f"{own} holds queries that were made by hand: move {folder} elsewhere first")
    files = [path for path in _files_of(folder) if path.is_file()]
    if files and not _is_round(folder):
        raise FileExistsError(f"{folder} is not the folder of a round: move it elsewhere, or name another --run folder")
    remove_files(folder.parent, files)


def _is_round(folder: Path) -> bool:
    named = re.fullmatch(r"round_\d\d+", folder.name) is not None
    # a round writes its pool.json before its run.json
    return named and ((folder / "pool.json").is_file() or RunFolder(folder).read_record() is not None)


def _files_of(folder: Path) -> list[Path]:
    run = RunFolder(folder)
    return [*run.written(), folder / "config.yaml", run.pool, run.record_file]
