"""The numbers that flags take, and what is said about others."""

import dataclasses
import math

import pytest

from guided_diffusion.runtime.command_line.flags import MOST, Range, flag, from_mapping
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = flag(1, "how many", "-n", least=1)
    share: float = flag(0.5, "how much", above=0, below=1)
    rank: int = flag(-1, "which", least=1, most=9, also=-1)
    where: float | None = flag(None, "any", type=float, least=-MOST)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--count 0", "--count 0: must be at least 1 and at most 1000000000"),
        ("-n -1", "--count -1: must be at least 1"),
        (f"--count {10**18}", f"--count {10**18}: must be at least 1"),
        ("--count nan", "invalid int value: 'nan'"),
        ("--share 0", "--share 0.0: must be above 0 and below 1"),
        ("--share 1", "--share 1.0: must be above 0"),
        ("--share nan", "--share nan: must be above 0"),
        ("--share=-inf", "--share -inf: must be above 0"),
        ("--rank 0", "--rank 0: must be between 1 and 9, or -1"),
        ("--rank 10", "--rank 10: must be between 1 and 9, or -1"),
        ("--where inf", "--where inf: must be at least -1000000000"),
    ],
)
def test_a_number_outside_is_refused(words, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        parse_flags(make_parser(None, Config), words.split())


def test_numbers_inside_are_taken():
    words = ["-n", "7", "--share", "0.01", "--rank", "-1", "--where", "-3"]
    found = parse_flags(make_parser(None, Config), words)
    assert found == {"count": 7, "share": 0.01, "rank": -1, "where": -3}


def test_both_ends_are_inside():
    limits = Range(least=0, most=1)
    for value in (0, 1):
        limits.check("x", value)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            limits.check("x", value)


def test_numbers_in_files_have_the_same_limits():
    assert from_mapping(Config, {"count": 7, "where": None}) == Config(7)
    with pytest.raises(UserError, match="count 0: must be at least 1"):
        from_mapping(Config, {"count": 0})
    with pytest.raises(UserError, match="share nan: must be above 0"):
        from_mapping(Config, {"share": math.nan})
