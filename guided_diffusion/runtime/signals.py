"""Signals that ask a run to stop: finish the step, save, leave with a code that says so."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; run the same command again.
EXIT_STOPPED = 75

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")

# A launcher may forward the SIGINT that the terminal has sent to the ranks as well. Two within this
# time, in seconds, are one press of Ctrl-C.
SAME_PRESS_S = 0.5


class StopRequest:
    """While open, a stop signal is noted instead of ending the process.

    `requested` is None, then the name of the first signal that came: SIGTERM, SIGUSR1 (the usual
    warning of a batch system) or SIGINT. The second SIGINT raises KeyboardInterrupt at once. The
    earlier handlers come back on leaving. Python delivers signals to the main thread only, so
    opened in another thread this notes nothing and changes nothing.

        with StopRequest() as stop:
            while not stop.requested:
                step()
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._interrupted_at: float | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > SAME_PRESS_S:
                raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number).name


def leave_to_parent(worker_id: int = 0) -> None:
    """In a data loader's worker (its `worker_init_fn`): stop signals are the parent's affair.

    Ctrl-C in a terminal and Slurm's signals reach the workers too, and a run whose workers died
    cannot finish its step. Only the parent's own SIGTERM ends the worker, as before.
    """
    signals = {getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)}
    if not hasattr(signal, "sigwaitinfo"):  # only Linux says who has sent a signal
        for number in signals - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        return

    def wait() -> None:
        while True:
            info = signal.sigwaitinfo(signals)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    # Blocked here and in the threads to come, so that they arrive at the one that waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=wait, name="stop-signals", daemon=True).start()
