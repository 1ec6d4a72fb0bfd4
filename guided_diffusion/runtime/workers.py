"""Tasks worked on by several processes, which stop together: at a signal, an error, or the parent's
end.

Each process is a fresh interpreter (a forked one would inherit torch's threads in an unknown
state), shows no progress bar, and takes the next task until there is none.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from guided_diffusion.runtime import interrupts, progress, session
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.signals import StopRequest, stop_signals

Task = TypeVar("Task")
# seconds between looks at whether this process has been asked to stop
_LOOK_EVERY = 0.5


class Outcome(NamedTuple):
    """Of a task: the signal that stopped it before its end, if any, and what to tell the user."""

    stopped_by: str | None = None
    message: str = ""


def side_by_side(
    work: Callable[[Task], Outcome],
    tasks: Sequence[Task],
    jobs: int,
    begin: Callable[[], None],
    report: Callable[[Task, Outcome], None],
) -> str | None:
    """Work on all tasks; returns the signal that stopped it, if any.

    A signal is passed on to the tasks, which save and stop; no other task starts then.

    :param work: does a task, in the main thread of its process. It is pickled, as tasks are.
    :param jobs: number of processes.
    :param begin: called first in every process; pickled.
    :param report: called here for each task that has ended.
    :raises Exception: the first that a task raised, when the other tasks have stopped.
    :raises UserError: if a process dies.
    """
    waiting = list(reversed(tasks))
    errors: list[Exception] = []
    stopped_by: str | None = None
    with StopRequest() as stop, _started(work, begin, min(jobs, len(tasks))) as workers:
        for worker in workers:
            worker.give(waiting.pop())
        while busy := {w.connection: w for w in workers if w.task is not None}:
            for connection in wait(list(busy), _LOOK_EVERY):
                worker = busy[connection]  # type: ignore[index]  # they are what was waited for
                task, found = worker.take()
                if isinstance(found, Exception):
                    errors.append(found)
                else:
                    report(task, found)
                    stopped_by = stopped_by or found.stopped_by
                if waiting and not (errors or stopped_by or stop.requested):
                    worker.give(waiting.pop())
            if errors or stopped_by or stop.requested:
                for worker in workers:
                    worker.ask_to_stop()
    if errors:
        raise errors[0]
    return stop.requested or stopped_by


class _Worker:
    """A process, and the task that it works on."""

    def __init__(self, work: Callable[[Any], Outcome], begin: Callable[[], None]):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.task: Any = None
        self._asked = False
        arguments = (theirs, session.current(), work, begin)
        self._process = context.Process(target=_serve, args=arguments)
        with _signals_held_back():  # until the process is ready for them
            self._process.start()
        theirs.close()

    def give(self, task: Any) -> None:
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # `take` tells how it died
            self.connection.send(task)

    def take(self) -> tuple[Any, Outcome | Exception]:
        """The task and what became of it."""
        task, self.task = self.task, None
        try:
            return task, self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            if self._asked and code == -signal.SIGTERM:
                return task, Outcome("SIGTERM")
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            memory = "; out of memory? lower --jobs" if how == "SIGKILL" else ""
            return task, UserError(f"the process of {task} ended with {how}{memory}")

    def ask_to_stop(self) -> None:
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def end(self) -> None:
        """End when it has stopped its task, or at once if it has none."""
        self.connection.close()
        if self.task is not None:
            self.ask_to_stop()
        self._process.join()


@contextlib.contextmanager
def _started(
    work: Callable[[Any], Outcome], begin: Callable[[], None], count: int
) -> Iterator[list[_Worker]]:
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(work, begin))
        yield workers
    finally:
        for worker in workers:
            worker.end()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Signals that ask to stop wait until the end; a process started meanwhile holds them back."""
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        yield


def _serve(
    connection: Connection,
    parents: session.Session,
    work: Callable[[Any], Outcome],
    begin: Callable[[], None],
) -> None:
    """A process's life: tasks from the connection, until it closes or a signal asks to stop."""
    session.enter(parents)
    progress.hide_bars()
    interrupts.ignore()  # but for `stop`, which does not: after the last task none is of use
    with contextlib.suppress(KeyboardInterrupt, EOFError, ConnectionError), StopRequest() as stop:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        begin()
        while True:
            task = connection.recv()
            if stop.requested:
                connection.send(Outcome(stop.requested))
                return
            try:
                connection.send(work(task))
            except Exception as error:  # the parent raises it
                connection.send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The error itself, if it survives pickling; otherwise its traceback."""
    if isinstance(error, UserError | OSError | MemoryError):
        with contextlib.suppress(Exception):
            return pickle.loads(pickle.dumps(error))
    return RuntimeError(f"in another process:\n{traceback.format_exc()}")


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
