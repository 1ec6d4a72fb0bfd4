"""What a command says besides its results: notes, warnings and logs, all on standard error.

Results go to standard output with `print`. So `COMMAND 2>/dev/null` shows the results alone, and
--quiet leaves out the notes.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

_quiet = False
_in_command = False


@contextlib.contextmanager
def in_command() -> Iterator[None]:
    """In the context this process runs a command: logs go to standard error."""
    global _in_command, _quiet
    before, _in_command = (_in_command, _quiet), True
    try:
        yield
    finally:
        _in_command, _quiet = before


def is_command() -> bool:
    """Whether this process runs a command, rather than a program that uses the package."""
    return _in_command


@contextlib.contextmanager
def quieter(quiet: bool = True) -> Iterator[None]:
    """No notes in the context, if `quiet`."""
    before = _quiet
    set_quiet(_quiet or quiet)
    try:
        yield
    finally:
        set_quiet(before)


def set_quiet(quiet: bool) -> None:
    """Whether notes and progress bars are left out from now on."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether notes and progress bars are left out."""
    return _quiet


def log_stream() -> TextIO:
    """Where logs go: to standard error in a command, else to standard output as in the original."""
    return sys.stderr if _in_command else sys.stdout


def note(text: str) -> None:
    """Say something that is no result, above the progress bar if there is one."""
    if not _quiet:
        write(text, sys.stderr)


def warn(text: str) -> None:
    """Say what may be wrong with the results, --quiet or not."""
    write(f"warning: {text}", sys.stderr)


def write(text: str, stream: TextIO) -> None:
    """Write a line to the screen so that it does not break a progress bar."""
    tqdm.write(text, file=stream)
    stream.flush()
