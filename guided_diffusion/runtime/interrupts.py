"""Ctrl-C ends a command with one line and exit code 130, wherever it arrives.

Python raises KeyboardInterrupt at whatever it is doing. While modules are imported, that is often
code of a library that drops the exception or turns it into another one; then the process ends at
once, since nothing is written yet. So it does where Python itself drops exceptions, as in
destructors. A process that a data loader forked ends without a word: its parent has one to say.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 128 + signal.SIGINT
LINE = "error: interrupted"

_watched_by: int | None = None  # the process that `watch` was called in


def watch() -> None:
    """Handle Ctrl-C from now on, unless the caller of this process has had it ignored."""
    global _watched_by
    _watched_by = os.getpid()
    sys.unraisablehook = _unraisable
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def ignore() -> None:
    """Ignore Ctrl-C from now on: this process is about to end anyway."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _forked() or _importing(frame):
        _end()
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(unraisable)


def _end() -> None:
    """End at once. Locks are given back; other exit handlers may wait for what will not come."""
    if run_lock := sys.modules.get("guided_diffusion.runtime.storage.run_lock"):
        run_lock.release_all()
    if not _forked():
        sys.stdout.flush()
        os.write(2, f"{LINE}\n".encode())
    os._exit(EXIT_INTERRUPTED)


def _forked() -> bool:
    return os.getpid() != _watched_by


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
