"""Lets the tools run from a checkout without installing the package."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from guided_diffusion.runtime.errors import report_early  # noqa: E402 - found only now

report_early()
