"""CONTRIBUTING.md names files, functions and tables that exist."""

import importlib
import re

import pytest
from paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
REFERENCES = sorted(set(re.findall(r"`([\w/]+)\.py:([\w.]+)`", TEXT)))
ENTRIES = sorted(set(re.findall(r"`([A-Z_]+)` in `([\w/]+)\.py`", TEXT)))


@pytest.mark.parametrize(("module", "name"), REFERENCES + [(m, n) for n, m in ENTRIES])
def test_what_it_names_exists(module, name):
    found = importlib.import_module(f"guided_diffusion.{module.replace('/', '.')}")
    for part in name.split("."):
        found = getattr(found, part)


def test_it_stays_short_and_names_something():
    assert len(TEXT.splitlines()) <= 80
    assert len(REFERENCES) > 25
    assert len(ENTRIES) == 3
