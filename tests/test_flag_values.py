"""Whatever value a flag is given, every command answers with a result or with one line.

The flags come from the parsers. What the parser lets pass goes through the whole command, on tiny
data and with a tiny network, so that it reaches the place where it is used; a flag that several
commands share does so in the first of COMMANDS.
"""

import argparse
import contextlib
import functools
import os
import re
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
from commands_util import COMMANDS, arguments, path_of, prepare_commands
from conftest import run_script

from guided_diffusion.runtime.command_line import commands
from guided_diffusion.runtime.command_line.parsing import CommandParser
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.segmentation.inference import serve

NUMBERS = ("-1", "0", "1e30", str(10**18), str(-(10**18)), "nan", "inf", "-inf", "x", "")
TEXTS = (",", "9" * 30, "x: '1")
LISTS = ("nan,-1", "1e30,0")  # of numbers, where the help has any
BUSY_S, TOO_LONG_S = 2, 120  # of the processor, and by the clock
MEMORY = 16 * 2**30  # bytes of address space, beyond what is in use
# takes minutes by design
SKIPPED = {("compile", "True")}


@functools.cache
def parser_of(name: str) -> CommandParser:
    """The parser of a command."""
    return commands.parser_of(path_of(name))


def flags_of(name: str) -> list[argparse.Action]:
    texts = ("help", "help_all", "version")
    return [a for a in parser_of(name)._actions if a.option_strings and a.dest not in texts]


def values_of(name: str, action: argparse.Action) -> tuple[str, ...]:
    default = parser_of(name).defaults.get(action.dest)
    if action.type in (int, float):
        return NUMBERS
    if action.option_strings[0] in parser_of(name).switches:
        return str(not default), "maybe"
    if action.choices:
        return ("x",)
    return TEXTS + LISTS * bool(re.search(r"\d", f"{action.help} {default}"))


def spelt(action: argparse.Action, value: str) -> list[str]:
    """The flag with a value, as on the command line."""
    if isinstance(action.nargs, int):
        return [action.option_strings[-1], *[value] * action.nargs]
    return [f"{action.option_strings[0]}={value}"]


@contextlib.contextmanager
def limits():
    """Asks a run that lasts to stop, as a batch system does; ends it if it hangs; bounds its
    memory."""

    def ask(*_):
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)

    def end(*_):
        raise TimeoutError("hangs")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = ((signal.ITIMER_PROF, BUSY_S, 1), (signal.ITIMER_REAL, TOO_LONG_S, 0))
    signal.signal(signal.SIGPROF, ask)
    signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        for timer, seconds, again in timers:
            signal.setitimer(timer, seconds, again)
        yield
    finally:
        for timer, *_ in timers:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def complaint(name: str, arguments: list[str], wanted=(0, 1, 2, EXIT_STOPPED)) -> str:
    """What is wrong with how a command answers; "" if nothing is."""
    try:
        parser_of(name).parse(arguments)
    except UserError as error:
        return "two lines" if "\n" in str(error) else ""
    try:
        with limits():
            ended = run_script(name, *arguments)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    lines = re.findall(r"^error: .*", ended.err, re.MULTILINE)
    if ended.code not in wanted:
        return f"exit code {ended.code}: {ended.err}"
    if (ended.code == 2) != (len(lines) == 1) or "Traceback" in ended.err:
        return f"exit code {ended.code}: {ended.err}"
    return ""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return prepare_commands(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def answer(script, workshop, monkeypatch):
    """Runs a command in the workshop, without leaving anything there; see `complaint`."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("OPENAI_LOGDIR", "out")
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    at_once = SimpleNamespace(Event=lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(serve, "threading", at_once)  # serve.py would wait for Ctrl-C
    known = set(os.listdir())

    def run(name, arguments, **more):
        try:
            return complaint(name, arguments, **more)
        finally:
            for left in set(os.listdir()) - known:
                (shutil.rmtree if os.path.isdir(left) else os.remove)(left)

    return run


TRIED = set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_value_of_every_flag(answer, name):
    wrong, works = [], set()
    for action in flags_of(name):
        base = arguments(name, "out", action.dest)
        for value in values_of(name, action):
            case = action.dest, action.help, value
            if case in TRIED or case[::2] in SKIPPED:
                continue
            TRIED.add(case)
            if tuple(base) not in works:  # else values might be refused for something else
                assert answer(name, base, wanted=(0,)) == "", base
                works.add(tuple(base))
            if said := answer(name, [*base, *spelt(action, value)]):
                wrong.append(f"--{action.dest}={value}: {said}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_says_its_range(name):
    numbers = [action for action in flags_of(name) if action.type in (int, float)]
    assert [action.dest for action in numbers if not hasattr(action, "limits")] == []
