"""What the command line says about this process as a whole: see `command_line/process_flags.py`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Session:
    """Whether the process runs a command, or a program that uses the package; and the flags.

    :param silent: whether nothing is said, as the log's files have it; bars are shown.
    :param device: --device; "" leaves it open.
    """

    command: bool = False
    quiet: bool = False
    silent: bool = False
    device: str = ""


_current = Session()


def current() -> Session:
    """That of this process."""
    return _current


def enter(session: Session) -> None:
    """From now on; such as in a worker process, with the session of its parent."""
    global _current
    _current = session


@contextlib.contextmanager
def changed(**fields: Any) -> Iterator[None]:
    """The session with other values, in the context."""
    before = _current
    enter(dataclasses.replace(before, **fields))
    try:
        yield
    finally:
        enter(before)
