"""The site and the commands that it shows; the modules of ``docs/_build`` can be imported here."""

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs/_build"))
