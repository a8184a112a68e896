"""Tests of the site and of the commands that it shows; they import the modules of ``docs/_build``."""

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs/_build"))
