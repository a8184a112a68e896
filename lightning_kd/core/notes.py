"""What the package tells its user in a line, by a logger of its own: Lightning's is silenced, see ``quiet``."""

from __future__ import annotations

import logging
import sys

from lightning.pytorch.utilities import rank_zero_only

__all__ = ["note"]


class _Screen(logging.Handler):
    """To what is ``sys.stderr`` at the moment, which a progress bar puts another in the place of."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


_LOG = logging.getLogger("lightning_kd")
_LOG.setLevel(logging.INFO)
if not _LOG.handlers:
    _LOG.addHandler(_Screen())


@rank_zero_only
def note(message: str) -> None:
    """Say it, on the first process alone; ``logging.getLogger("lightning_kd")`` can be told to be silent."""
    _LOG.info(message)
