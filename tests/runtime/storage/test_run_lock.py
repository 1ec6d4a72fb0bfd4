import json
import multiprocessing
import os
import random
import shlex
import signal
import threading
import time

import pytest
import torch as th
from process_util import Command

from guided_diffusion.runtime import processes
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.storage import lock_file, run_lock
from guided_diffusion.runtime.storage.files import read_json, save_json
from guided_diffusion.runtime.storage.lock_file import RunLock

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock_file, "BEAT_S", 0.05)
    monkeypatch.setattr(lock_file, "STALE_S", 0.6)
    monkeypatch.setattr(lock_file, "_POLL_S", 0.01)
    yield
    run_lock.release_all()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "run" / "run.lock")


def write(path: str, **changes) -> dict:
    """A lock of a process that takes no part: by default a living one of another host."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock = RunLock(path)
    record = json.loads(lock._content()) | {"host": "gpu02", "boot": "other"} | changes
    with open(f"{path}.new", "wb") as file:
        file.write(json.dumps(record).encode().ljust(511) + b"\n")
    os.replace(f"{path}.new", path)
    return record


def dead_pid() -> int:
    process = FORK.Process(target=lambda: None)
    process.start()
    process.join()
    return process.pid


def beat(path: str, stop: threading.Event, **changes) -> None:
    for number in range(10**6):
        if stop.wait(0.05):
            return
        write(path, token="f" * 32, beat=number, **changes)


def contend(path: str, start, answers, end) -> None:
    """In a process of its own: try to take the lock at a common moment, and keep it to the end."""
    lock = RunLock(path)
    start.wait()
    try:
        lock.acquire()
    except UserError as error:
        answers.put(str(error))
        return
    answers.put("held")
    end.wait()
    lock.check()
    lock.release()


def race(path: str, count: int = 6) -> list[str]:
    """What each of the processes says. A process that starts late finds the lock held as well."""
    start, answers, end = FORK.Barrier(count), FORK.Queue(), FORK.Event()
    processes = [
        FORK.Process(target=contend, args=(path, start, answers, end)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    end.set()
    for process in processes:
        process.join()
    assert not [process.exitcode for process in processes if process.exitcode]
    return found


@pytest.mark.parametrize("left", ["nothing", "a dead process", "another host", "an empty file"])
def test_of_processes_at_the_same_moment_one_holds_the_lock(path, left):
    if left == "a dead process":
        write(path, pid=dead_pid(), **processes.machine())
    elif left == "another host":
        write(path)
    elif left == "an empty file":
        os.makedirs(os.path.dirname(path))
        open(path, "w").close()
    found = race(path)
    assert found.count("held") == 1
    assert all("is in use by process" in text for text in found if text != "held")
    assert not os.path.exists(os.path.dirname(path)) or not os.listdir(os.path.dirname(path))


def test_the_refusal_names_process_host_and_start(path, monkeypatch):
    monkeypatch.setattr(lock_file, "STALE_S", 60)
    since = "2026-01-31 08:00:00+01:00"
    record = write(path, since=since)
    stop = threading.Event()
    thread = threading.Thread(target=beat, args=(path, stop), kwargs={"since": since})
    thread.start()
    try:
        with pytest.raises(UserError, match=r"process .* on gpu02 .since .* choose") as e:
            RunLock(path, instead="choose another folder").acquire()
    finally:
        stop.set()
        thread.join()
    assert str(record["pid"]) in str(e.value)
    assert since in str(e.value)


def test_a_process_gone_from_this_host_is_taken_over_at_once(path, monkeypatch):
    monkeypatch.setattr(lock_file, "STALE_S", float("inf"))
    write(path, pid=dead_pid(), **processes.machine())
    lock = RunLock(path)
    lock.acquire()
    lock.check()
    lock.release()
    assert not os.path.exists(path)


def test_a_number_given_to_another_process_is_no_sign_of_life(path, monkeypatch):
    monkeypatch.setattr(lock_file, "STALE_S", float("inf"))
    if not processes.stat(os.getpid())[1]:
        pytest.skip("start times of processes cannot be told here")
    write(path, pid=os.getpid(), started="1", **processes.machine())
    lock = RunLock(path)
    lock.acquire()
    lock.release()


def test_a_silent_host_is_taken_over_after_a_while_whatever_its_clock(path):
    write(path)
    future = time.time() + 10**6
    os.utime(path, (future, future))
    began = time.monotonic()
    lock = RunLock(path)
    lock.acquire()
    assert time.monotonic() - began >= 0.6
    lock.release()


def test_a_holder_that_is_stopping_is_waited_for(path, capsys, monkeypatch):
    monkeypatch.setattr(lock_file, "STALE_S", 60)
    write(path)
    stop = threading.Event()
    thread = threading.Thread(target=beat, args=(path, stop), kwargs={"stopping": 1})
    thread.start()
    threading.Timer(1.0, lambda: (stop.set(), thread.join(), os.remove(path))).start()
    lock = RunLock(path)
    lock.acquire()
    assert "which is stopping" in capsys.readouterr().err
    lock.release()


def test_several_crashes_in_a_row_are_taken_over_and_cleaned_up(path):
    for _ in range(3):
        process = FORK.Process(target=acquire_and_crash, args=(path,))
        process.start()
        process.join()
    folder = os.path.dirname(path)
    assert len(os.listdir(folder)) == 3
    assert race(path, 3).count("held") == 1
    assert not os.listdir(folder)


def acquire_and_crash(path: str) -> None:
    RunLock(path).acquire()
    os._exit(1)


def test_a_holder_that_was_taken_over_writes_nothing(path, tmp_path):
    folder = os.path.dirname(path)
    run_lock.hold_folder(folder, "")
    save_json(os.path.join(folder, "config.json"), 1)
    taker = write(path)
    with pytest.raises(UserError, match=r"was taken over by process .* on gpu02"):
        save_json(os.path.join(folder, "config.json"), 2)
    assert read_json(os.path.join(folder, "config.json")) == 1
    time.sleep(0.2)  # some beats
    run_lock.release_all()
    assert read_json(path) == taker


def hold_then_write(path: str, began, go, said) -> None:
    folder = os.path.dirname(path)
    run_lock.hold_folder(folder, "")
    save_json(os.path.join(folder, "config.json"), "first")
    began.set()
    go.wait()
    try:
        save_json(os.path.join(folder, "config.json"), "late")
    except UserError as error:
        said.put(str(error))
    said.put("")


def test_a_suspended_process_writes_nothing_once_it_was_taken_over(path):
    began, go, said = FORK.Event(), FORK.Event(), FORK.Queue()
    holder = FORK.Process(target=hold_then_write, args=(path, began, go, said))
    holder.start()
    assert began.wait(30)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        lock = RunLock(path)
        lock.acquire()
        save_json(os.path.join(os.path.dirname(path), "config.json"), "mine")
    finally:
        os.kill(holder.pid, signal.SIGCONT)
    go.set()
    assert f"was taken over by process {os.getpid()}" in said.get(timeout=30)
    holder.join()
    lock.check()
    assert read_json(os.path.join(os.path.dirname(path), "config.json")) == "mine"
    lock.release()


def test_a_process_that_runs_here_is_never_taken_over(path):
    write(path, **processes.identity())  # without signs of life
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        RunLock(path).acquire()


def test_the_same_process_may_ask_again(path):
    folder = os.path.dirname(path)
    run_lock.hold_folder(folder, "")
    run_lock.hold_folder(folder + "/", "")
    with run_lock.released():
        run_lock.hold_file(os.path.join(folder, "segm.pth"), "")
        assert sorted(os.listdir(folder)) == ["run.lock", "segm.pth.lock"]
    assert os.listdir(folder) == ["run.lock"]
    run_lock.check_held()


def test_without_hard_links(path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert race(path, 4).count("held") == 1


def test_in_the_cloud_other_processes_of_this_machine_are_refused():
    folder = f"gs://bucket/{os.getpid()}"
    run_lock.hold_folder(folder, "")
    child = FORK.Process(target=run_lock.hold_folder, args=(folder, ""))
    child.start()
    child.join()
    assert child.exitcode == 1
    run_lock.release_all()


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*: choose another"):
        RunLock(str(tmp_path / "file" / "run.lock")).acquire()


def test_beats_leave_randomness_alone(path):
    run_lock.hold_folder(os.path.dirname(path), "")
    before, beat = random.getstate(), lock_file._read(path)
    torch_before = th.get_rng_state()
    while lock_file._read(path) == beat:
        time.sleep(0.01)
    assert random.getstate() == before
    assert th.equal(th.get_rng_state(), torch_before)


def hold_and(path: str, then: str) -> None:
    def main() -> None:
        run_lock.hold_folder(os.path.dirname(path), "")
        os.kill(os.getpid(), getattr(signal, then)) if then != "error" else 1 / 0
        time.sleep(10)

    command(main)()


@pytest.mark.parametrize("then", ["error", "SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_the_lock_goes_with_its_process(path, then):
    os.makedirs(os.path.dirname(path))
    process = FORK.Process(target=hold_and, args=(path, then))
    process.start()
    process.join(30)
    expected = {"error": 1, "SIGINT": 130}.get(then) or -getattr(signal, then)
    assert process.exitcode == expected
    assert not os.path.exists(path)


PRETRAINING = shlex.split(
    "--image_size 16 --num_channels 32 --channel_mult 1 --num_res_blocks 1 --batch_size 1"
    " --attention_resolutions 999 --noise_schedule cosine --diffusion_steps 50 --save_interval 5"
    " --log_interval 1 --sample_interval 0 --max_steps 1000000 --data_dir"
)


def test_two_starts_in_one_run_folder_and_a_restart_after_a_kill(split, tmp_path):
    folder = tmp_path / "run"
    arguments = [*PRETRAINING, split / "TRAIN" / "IMG"]
    env = {"OPENAI_LOGDIR": str(folder)}

    def start(name: str) -> Command:
        return Command("image_train.py", arguments, env, tmp_path / name)

    runs = [start("one"), start("other")]
    end = time.monotonic() + 120
    while all(run.process.is_alive() for run in runs):
        assert time.monotonic() < end
        time.sleep(0.01)
    (refused,) = (run for run in runs if not run.process.is_alive())
    (trains,) = (run for run in runs if run is not refused)
    assert refused.wait() == 2
    (line,) = [text for text in refused.said.splitlines() if text.startswith("error: ")]
    assert f"process {trains.process.pid} on" in line
    assert "Traceback" not in refused.said
    trains.wait_for((folder / "state000005.pt").exists)
    trains.send("SIGKILL")
    assert trains.wait() == -9
    assert (folder / "run.lock").exists()
    saved = set(folder.glob("state*"))
    again = start("again")
    again.wait_for(lambda: set(folder.glob("state*")) > saved)
    assert "resuming from" in (folder / "log.txt").read_text()
    again.send("SIGTERM")
    assert again.wait() == 75
    assert not list(folder.glob("run.lock*"))
