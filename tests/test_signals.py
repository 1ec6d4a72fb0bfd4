"""guided_diffusion.signals: noted while open, nothing changed afterwards."""

import os
import signal
import threading
import time

import pytest

from guided_diffusion import signals
from guided_diffusion.signals import EXIT_STOPPED, StopRequest


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
