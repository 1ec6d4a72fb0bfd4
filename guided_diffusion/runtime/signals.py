"""Signals that ask a run to stop: it finishes the step, saves, and exits with its own code."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from guided_diffusion.runtime.storage import run_lock

# EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; rerun the command to resume.
EXIT_STOPPED = 75

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")

# Seconds within which two SIGINTs count as one press of Ctrl-C: the terminal sends it to the ranks,
# and a launcher may forward its own.
SAME_PRESS_S = 0.5


class StopRequest:
    """Records a stop signal instead of letting it end the process.

    `requested` is None until a signal arrives, then the name of the first: SIGTERM, SIGUSR1 (the
    usual warning of a batch system) or SIGINT. A second SIGINT raises KeyboardInterrupt at once.
    The previous handlers are restored on exit. Python delivers signals to the main thread only: in
    any other thread this has no effect.

        with StopRequest() as stop:
            while not stop.requested:
                step()
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}  # handlers
        self._interrupted_at: float | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > SAME_PRESS_S:
                raise KeyboardInterrupt
        run_lock.note_stopping()
        if self.requested is None:
            self.requested = signal.Signals(number).name


def stop_signals() -> set[signal.Signals]:
    """STOP_SIGNALS as far as they exist here: Windows has no SIGUSR1."""
    return {getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)}


def leave_to_parent(worker_id: int = 0) -> None:
    """Make a data loader's worker (as its `worker_init_fn`) leave stop signals to the parent.

    Ctrl-C in a terminal and Slurm's signals reach the workers too, and a run cannot finish its step
    once its workers have died. A SIGTERM from the parent itself still ends the worker.
    """
    signals = stop_signals()
    if not hasattr(signal, "sigwaitinfo"):  # only Linux tells who sent a signal
        for number in signals - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        return

    def wait() -> None:
        while True:
            info = signal.sigwaitinfo(signals)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    # Blocked in this and all later threads, so that they arrive in the one that waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=wait, name="stop-signals", daemon=True).start()
