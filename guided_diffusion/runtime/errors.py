"""Errors that users can cause end in one clear line and exit code 2, never in a traceback."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from types import TracebackType

from guided_diffusion.runtime import interrupts, session
from guided_diffusion.runtime.interrupts import EXIT_INTERRUPTED
from guided_diffusion.runtime.text import one_line, print_any_name, visible

EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, which Windows does not have

_RERUN = "free some and rerun the command; files that were written before are intact"
# What to say when the system refuses to write {path}, and what to do about it.
_REFUSALS = {
    errno.ENOSPC: f"no space left to write {{path}}: {_RERUN}",
    errno.EDQUOT: f"no space left to write {{path}}, the disk quota is used up: {_RERUN}",
    errno.EFBIG: "{path} is larger than the limit on file sizes allows (ulimit -f): raise it and"
    " rerun the command; files that were written before are intact",
    errno.EROFS: "cannot write {path}: the file system is read-only; name another place",
    errno.EACCES: "cannot write {path}: permission denied; name another place",
    errno.EPERM: "cannot write {path}: operation not permitted; name another place",
    errno.ENOTDIR: "cannot write {path}: a file is in the way of a folder; name another place",
    errno.EEXIST: "cannot write {path}: a file is in the way of a folder; name another place",
    errno.EISDIR: "cannot write {path}: it is a folder; name a file",
    errno.ENAMETOOLONG: "cannot write {path}: the name is too long; choose a shorter one",
    errno.ENOENT: "cannot write {path}: its folder has gone; rerun the command",
}
# what fails for want of memory, in the words of torch
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


class UserError(ValueError):
    """An error the user can fix. Its message is one line: what is wrong, where, with which values,
    and what to do."""


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error that caused an error, if any: torch wraps those of its files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def write_error(path: str, error: OSError) -> UserError:
    """What to tell a user whose output cannot be written."""
    default = f"cannot write {{path}}: {error.strerror}; files written before are intact"
    return UserError(_REFUSALS.get(error.errno or 0, default).format(path=path))


def as_user_error(error: BaseException) -> UserError | None:
    """The one line for an error that lies outside the program: one of the operating system, such
    as a full disk, or too little memory; None for what may be a fault of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    ):
        said = one_line(error)
        return UserError(
            f"out of memory ({said}): lower --batch_size or the sizes of images and network"
        )
    if isinstance(error, UnicodeEncodeError):  # a library that takes no other names
        text = visible(error.object)[:200]
        return UserError(f"{text!r} holds bytes that are not UTF-8: rename the file or folder")
    if type(error).__module__.startswith("blobfile"):  # a path that it does not know, the cloud
        return UserError(str(error))
    cause = system_error(error) if isinstance(error, OSError | RuntimeError) else None
    if cause is None:
        return None
    name = cause.filename
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return write_error(str(name or "the output"), cause)
    place = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
    return UserError(f"{place}{cause.strerror}")


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wrap the `main` of a script: an error that lies outside the program becomes one line on
    stderr and exit code 2, Ctrl-C one line and 130.

    :param main: returns the exit code, or None for 0.
    """

    @functools.wraps(main)
    def run() -> None:
        from guided_diffusion.runtime.storage import run_lock  # which imports this module

        print_any_name()
        try:
            with session.changed(command=True):
                code = main()
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            code = _report(error)
            if code is None:
                raise
        finally:
            run_lock.release_all()
        sys.exit(code or 0)

    return run


def report_early() -> None:
    """From now on, report errors as `command` does: for what happens before, while importing.

    Ctrl-C ends the process from now on as `interrupts` says.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        code = _report(error)
        if code is not None:
            os._exit(code)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    interrupts.watch()


def _report(error: BaseException) -> int | None:
    """Print the one line of an error; returns the exit code, None for a fault of the program."""
    if isinstance(error, BrokenPipeError):
        line, code = "", EXIT_BROKEN_PIPE  # a reader such as `head` has seen enough
    elif isinstance(error, KeyboardInterrupt):
        line, code = interrupts.LINE, EXIT_INTERRUPTED
    elif known := as_user_error(error):
        line, code = f"error: {' '.join(str(known).split())}", EXIT_USER_ERROR
    else:
        return None
    if line:
        print(line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # Python would complain about it once more at the end
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
