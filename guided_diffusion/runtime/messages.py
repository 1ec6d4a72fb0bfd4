"""What a command says besides its results: notes, warnings and logs, all on standard error.

Results go to standard output with `print`. So `COMMAND 2>/dev/null` shows the results alone, and
--quiet leaves out the notes.
"""

import sys
from typing import TextIO

from tqdm import tqdm

from guided_diffusion.runtime import session

_WARNING = "warning: "

_announced = ""


def is_quiet() -> bool:
    """Whether notes and progress bars are left out."""
    return session.current().quiet


def log_stream() -> TextIO:
    """Where logs go: to standard error in a command, else to standard output as in the original."""
    return sys.stderr if session.current().command else sys.stdout


def hidden(text: str) -> bool:
    """Whether a message is hidden; --quiet hides all but warnings."""
    return session.current().silent or (is_quiet() and not text.startswith(_WARNING))


def announce(text: str) -> None:
    """Say this before all else that is said; not if there is nothing but an error."""
    global _announced
    _announced = text


def begin_work() -> None:
    """Say what was announced, now that no mistake of the user's has been found."""
    global _announced
    text, _announced = _announced, ""
    if text and not is_quiet():
        tqdm.write(text, file=sys.stderr)


def say(text: str) -> None:
    """Say something that is no result, above the progress bar if there is one."""
    if not hidden(text):
        write(text, sys.stderr)


def warn(text: str) -> None:
    """Say what may be wrong with the results."""
    say(_WARNING + text)


def write(text: str, stream: TextIO) -> None:
    """Write a line to the screen so that it does not break a progress bar."""
    begin_work()
    tqdm.write(text, file=stream)
    stream.flush()
