"""guided_diffusion.runtime.signals: noted while open, nothing changed afterwards."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.runtime import signals
from guided_diffusion.runtime.signals import EXIT_STOPPED, StopRequest, leave_to_parent


def send(name):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.01)  # handlers run between bytecodes


def handlers():
    return [signal.getsignal(getattr(signal, name)) for name in signals.STOP_SIGNALS]


def test_exit_code_is_ex_tempfail():
    assert EXIT_STOPPED == os.EX_TEMPFAIL


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_by_its_name(name):
    with StopRequest() as stop:
        assert stop.requested is None
        send(name)
        assert stop.requested == name


def test_the_first_signal_is_the_reason():
    with StopRequest() as stop:
        send("SIGUSR1")
        send("SIGTERM")
        assert stop.requested == "SIGUSR1"


def test_the_second_interrupt_acts_at_once(monkeypatch):
    monkeypatch.setattr(signals, "SAME_PRESS_S", 0.02)
    with StopRequest() as stop:
        send("SIGINT")
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
        assert stop.requested == "SIGINT"


def test_an_interrupt_forwarded_twice_is_one():
    with StopRequest() as stop:
        send("SIGINT")
        send("SIGINT")
        assert stop.requested == "SIGINT"


def test_an_interrupt_after_another_signal_is_the_first_interrupt():
    with StopRequest() as stop:
        send("SIGTERM")
        send("SIGINT")
        assert stop.requested == "SIGTERM"


def test_handlers_come_back_also_after_an_error():
    before = handlers()
    with pytest.raises(RuntimeError), StopRequest():  # noqa: PT012
        assert handlers() != before
        raise RuntimeError
    assert handlers() == before


def test_another_thread_changes_nothing():
    before, seen = handlers(), []

    def work():
        with StopRequest() as stop:
            seen.append((handlers(), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


class Slow(Dataset):
    """Says which process reads it."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        time.sleep(0.01)
        return os.getpid()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="only Linux says who sent a signal")
def test_a_worker_leaves_signals_to_its_parent():
    loader = DataLoader(Slow(), batch_size=1, num_workers=1, worker_init_fn=leave_to_parent)
    batches = iter(loader)
    pid = int(next(batches))
    assert pid != os.getpid()
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)  # another process than this
        next(batches)
    assert {int(batch) for batch in batches} == {pid}
    assert len(list(loader)) == 20


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="only Linux says who sent a signal")
def test_the_parent_can_end_its_worker():
    child = multiprocessing.get_context("fork").Process(target=idle)
    child.start()
    time.sleep(0.3)
    child.terminate()
    child.join(10)
    assert child.exitcode == 0


def idle():
    leave_to_parent()
    time.sleep(60)
