"""Short messages to the user, by the logger ``lightning_kd`` (Lightning's own is silenced, see ``quiet``)."""

from __future__ import annotations

import logging
import sys

from lightning.pytorch.utilities import rank_zero_only

__all__ = ["note"]


class _Screen(logging.Handler):
    """Prints to the present ``sys.stderr``, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


_LOG = logging.getLogger("lightning_kd")
_LOG.setLevel(logging.INFO)
if not _LOG.handlers:
    _LOG.addHandler(_Screen())


@rank_zero_only
def note(message: str) -> None:
    """Print ``message`` on process 0; ``logging.getLogger("lightning_kd").setLevel("WARNING")`` turns this off."""
    _LOG.info(message)
