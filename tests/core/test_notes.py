"""Notes of the package are printed although Lightning's messages are silenced."""

import logging

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_kd.core.notes import note
from lightning_kd.core.quiet import quiet


def test_notes_are_printed_by_the_first_process_only(capsys, monkeypatch):
    quiet()
    rank_zero_info("of Lightning")
    note("of ours")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    note("again")
    assert capsys.readouterr().err == "of ours\n"


def test_logging_level_silences_notes(capsys):
    log = logging.getLogger("lightning_kd")
    log.setLevel(logging.WARNING)
    try:
        note("of ours")
    finally:
        log.setLevel(logging.INFO)
    assert capsys.readouterr().err == ""
