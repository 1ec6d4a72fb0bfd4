"""guided_diffusion.runtime.workers: several processes that stop together."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.signals import StopRequest
from guided_diffusion.runtime.workers import Outcome, side_by_side

HERE = Path(__file__).resolve().parent
LONGEST_S = 60


def nothing():
    pass


def write_process(folder, number):
    """Leaves the number of its process, and does not end before another process has begun."""
    (folder / str(number)).write_text(str(os.getpid()))
    wait_for(lambda: len({path.read_text() for path in folder.iterdir()}) > 1)
    return Outcome(message=f"did {number}")


def train(folder, number):
    """As training does: stops when asked to, and saves."""
    with StopRequest() as stop:
        (folder / f"began{number}").write_text(str(os.getpid()))
        wait_for(lambda: stop.requested)
        (folder / f"saved{number}").touch()
    return Outcome(stop.requested)


def fail(folder, number):
    if number == 1:
        wait_for((folder / "began0").exists)
        raise UserError("the mask of image 1 is missing")
    return train(folder, number)


def crash(folder, number):
    if number == 1:
        wait_for((folder / "began0").exists)
        os.kill(os.getpid(), signal.SIGKILL)
    return train(folder, number)


def stumble(folder, number):
    raise ZeroDivisionError("a fault of the program")


def wait_for(condition):
    end = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_every_task_is_done_once_and_reported(tmp_path):
    reported = []
    work = functools.partial(write_process, tmp_path)
    stopped_by = side_by_side(work, [3, 1, 2, 4, 0], 2, nothing, lambda *x: reported.append(x))
    assert stopped_by is None
    assert sorted(reported) == [(n, (None, f"did {n}")) for n in range(5)]
    processes = {path.read_text() for path in tmp_path.iterdir()}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


@pytest.mark.parametrize(
    ("work", "said"),
    [(fail, "the mask of image 1 is missing"), (crash, "process of 1 ended with SIGKILL; out of")],
)
def test_an_error_stops_the_others_which_save(tmp_path, work, said):
    reported = []
    with pytest.raises(UserError, match=said):
        side_by_side(
            functools.partial(work, tmp_path),
            range(4),
            2,
            nothing,
            lambda task, outcome: reported.append((task, outcome.stopped_by)),
        )
    assert reported == [(0, "SIGTERM")]
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0"]


def test_a_fault_keeps_its_traceback(tmp_path):
    work = functools.partial(stumble, tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)in stumble.*a fault of the program"):
        side_by_side(work, [0], 1, nothing, print)


PROGRAM = """
import functools, pathlib, sys
sys.path.insert(0, sys.argv[2])
import test_workers as t
work = functools.partial(t.train, pathlib.Path(sys.argv[1]))
print(t.side_by_side(work, [0, 1, 2, 3], 2, t.nothing, lambda *_: None))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_signal_to_the_parent_stops_all(tmp_path, name):
    """Even one that the parent cannot pass on."""
    program = tmp_path / "program.py"  # a file, as spawned processes import the main module anew
    program.write_text("if __name__ == '__main__':\n" + PROGRAM.replace("\n", "\n    "))
    data = tmp_path / "data"
    data.mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(program), str(data), str(HERE)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    wait_for(lambda: (data / "began0").exists() and (data / "began1").exists())
    processes = [int((data / f"began{n}").read_text()) for n in range(2)]
    parent.send_signal(getattr(signal, name))
    said, _ = parent.communicate(timeout=LONGEST_S)
    assert said.strip() == ("" if name == "SIGKILL" else name)
    wait_for(lambda: not any(map(is_running, processes)))
    assert sorted(path.name for path in data.glob("saved*")) == ["saved0", "saved1"]
    assert not (data / "began2").exists()
