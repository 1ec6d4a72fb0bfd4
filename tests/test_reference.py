"""docs/reference/ says what the parsers say."""

import dataclasses
import importlib.util
import re

import pytest
from paths import ROOT

FOLDER = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def reference():
    path = ROOT / "tools" / "documentation" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_those_of_the_parsers(reference):
    made = reference.pages()
    assert {"index.md", "benchmarks.md", "finetune.md", "prepare_data.md"} < set(made)
    kept = {page.name: page.read_text() for page in FOLDER.glob("*.md")}
    stale = sorted(name for name in {*made, *kept} if made.get(name) != kept.get(name))
    assert not stale, f"run `make reference`: {', '.join(stale)}"


def test_a_page_has_every_flag_with_its_default(reference):
    path = ROOT / "scripts" / "evaluate.py"
    page = (FOLDER / "evaluate.md").read_text()
    flags = reference.flags_of(reference.parser_of(path))
    assert len(flags) > 15
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for flag in flags:
        name = flag.metavar if flag.positional else f"--{flag.name}"
        start = rf"\| (\*\*)?(`|<code>){re.escape(name.replace('|', '&#124;'))}[ `<]"
        (row,) = [row for row in rows if re.match(start, row)]
        assert flag.default in row.replace("`", "")


def test_a_changed_flag_changes_its_page(reference, monkeypatch):
    path, flags_of = ROOT / "scripts" / "probe.py", reference.flags_of

    def changed(parser):
        first, *others = flags_of(parser)
        return [dataclasses.replace(first, help="a|b *c* __d__ e_f --output <g>"), *others]

    monkeypatch.setattr(reference, "flags_of", changed)
    page = reference._command(path)
    assert page != (FOLDER / "probe.md").read_text()
    assert r"| a\|b \*c\* \__d_\_ e_f `--output` &lt;g> |" in page
