"""Every script of the original has the original's flags with their defaults."""

import dataclasses
import json

import pytest
from golden_util import GOLDEN

from guided_diffusion import flags

ORIGINAL = json.loads((GOLDEN / "cli_flags.json").read_text())


@pytest.fixture
def flags_of(script, monkeypatch):
    """A function from a script's name to its parser and to the defaults of its flags."""

    def look(name):
        seen = {}

        def make_parser(description, *configs):
            seen["parser"] = make(description, *configs)
            fields = [f for config in configs for f in dataclasses.fields(config) if f.init]
            seen["defaults"] = {f.name: f.default for f in reversed(fields)}
            return seen["parser"]

        def given_flags(parser, argv=None):
            raise SystemExit(0)

        make = flags.make_parser
        monkeypatch.setattr(flags, "make_parser", make_parser)
        monkeypatch.setattr(flags, "given_flags", given_flags)
        assert script(name).code == 0
        monkeypatch.undo()
        return seen["parser"], seen["defaults"]

    return look


@pytest.mark.parametrize("name", sorted(ORIGINAL))
def test_the_originals_flags_and_defaults(flags_of, name):
    parser, defaults = flags_of(name)
    theirs = ORIGINAL[name]
    assert {k: defaults.get(k, "missing") for k in theirs} == theirs
    for flag, default in theirs.items():
        assert type(defaults[flag]) is type(default), flag
        value = {"schedule_sampler": "uniform"}.get(flag, str(default))
        for spelling in (flag, flag.replace("_", "-")):
            found = flags.given_flags(parser, [f"--{spelling}", value])
            assert found == {flag: default}
