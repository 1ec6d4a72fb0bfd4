"""Ctrl-C: one line and exit code 130, wherever it arrives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

LONGEST_S = 60
# a package that takes an interruption for its own; the second time it is no interruption
SWALLOWING = """
import os, time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("numpy.core.multiarray failed to import")
"""


def start(words, folder, **env):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        start_new_session=True,  # a group of its own, which a terminal interrupts
    )


def interrupt(process):
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=LONGEST_S)


def wait_for(happened, process):
    end = time.monotonic() + LONGEST_S
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["evaluate.py", "image_train.py", "predict.py"])
def test_while_torch_is_imported(tmp_path, name):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(SWALLOWING)
    words = {"evaluate.py": ["a", "b"], "predict.py": ["a", "b"]}.get(name, [])
    process = start([ROOT / "scripts" / name, *words], tmp_path, PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "importing\n"
    assert interrupt(process) == ("", "error: interrupted\n")
    assert process.returncode == 130


BEGIN = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}]
from guided_diffusion.runtime.errors import command, report_early
report_early()
"""
MOMENTS = {
    "at work": """
@command
def main():
    print("ready", flush=True)
    time.sleep(60)
main()
""",
    "in a destructor": """
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
@command
def main():
    Slow()
    time.sleep(60)
main()
""",
    "at exit": """
import atexit
@atexit.register
def slow():
    print("ready", flush=True)
    time.sleep(60)
command(lambda: 0)()
""",
    "in a process that was forked": """
import multiprocessing
def work():
    print("ready", flush=True)
    time.sleep(60)
@command
def main():
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
main()
""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_at_any_moment(tmp_path, moment):
    process = start(["-c", BEGIN + MOMENTS[moment]], tmp_path)
    assert process.stdout.readline() == "ready\n"
    assert interrupt(process) == ("", "error: interrupted\n")
    assert process.returncode == 130


def test_it_stays_ignored_where_the_shell_ignores_it(tmp_path):
    """As of a command in the background of a script."""
    program = BEGIN + "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    words = ["bash", "-c", 'trap "" INT; exec "$@"', "-", sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


SIDE_BY_SIDE = f"""
import functools, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_workers as t
@command
def main():
    work = functools.partial(t.train, pathlib.Path(sys.argv[1]))
    print(t.side_by_side(work, [0, 1, 2, 3], 2, t.nothing, lambda *_: None))
    return 75
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("began", [1, 2])
def test_runs_side_by_side(tmp_path, began):
    """A terminal's processes all get the signal, perhaps as one starts; none prints a traceback."""
    program = tmp_path / "program.py"  # a file, as spawned processes import the main module anew
    program.write_text(BEGIN + SIDE_BY_SIDE)
    data = tmp_path / "data"
    data.mkdir()
    process = start([program, data], tmp_path)
    wait_for(lambda: len(list(data.glob("began*"))) >= began, process)
    assert interrupt(process) == ("SIGINT\n", "")
    assert process.returncode == 75
    names = {path.name.removeprefix("began") for path in data.glob("began*")}
    assert {path.name.removeprefix("saved") for path in data.glob("saved*")} == names
