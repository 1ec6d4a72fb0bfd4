"""Lets the tools run from a checkout without installing the package."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from guided_diffusion.runtime.errors import report_early  # noqa: E402 - found only now

report_early()
