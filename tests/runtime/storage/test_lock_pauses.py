"""A process pauses at each step of taking or releasing a lock, while others go on.

Clock and heartbeats are the tests' own: nothing here depends on the speed of the machine.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guided_diffusion.runtime import processes
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import lock_file
from guided_diffusion.runtime.storage.lock_file import RunLock

# whatever of these a lock calls is a step before which it may pause
STEPS = ("link", "rename", "replace", "remove", "open", "write", "fsync", "listdir")


class World:
    """The file system and clock of processes on hosts that know of each other by files alone."""

    def __init__(self, parent: Path):
        self.parent, self.number, self.now, self.beats = parent, 0, 0.0, 0
        self.begin(stale=False)

    def begin(self, stale: bool) -> None:
        """Begin with another folder.

        :param stale: whether a process on a host that crashed has left its lock there.
        """
        self.number += 1
        self.folder = str(self.parent / str(self.number) / "run")
        self.path = os.path.join(self.folder, "run.lock")
        self.alive: list[RunLock] = []
        self.holders: list[RunLock] | None = None
        self.until_pause: int | None = None
        if stale:
            os.makedirs(self.folder)
            with open(self.path, "wb") as file:
                file.write(RunLock(self.path)._content())

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Time passes, and the living give signs of life."""
        self.now += seconds
        for lock in self.alive:
            for name in os.listdir(self.folder):
                with open(os.path.join(self.folder, name), "r+b") as file:
                    content = file.read(512)
                    if lock.token.encode() in content:
                        self.beats += 1
                        record = json.loads(content) | {"beat": f"{self.beats:012d}"}
                        file.seek(0)
                        file.write(json.dumps(record).encode().ljust(511) + b"\n")

    def step(self) -> None:
        if self.until_pause is not None:
            self.until_pause -= 1
            if not self.until_pause:
                self.until_pause = None
                self.holders = self.others(self)

    @contextlib.contextmanager
    def paused_before(self, step: int, others: "Others") -> Iterator[None]:
        """The process of the `with` block pauses, while others go on."""
        self.until_pause, self.others = step, others
        yield
        self.until_pause = None

    def new(self) -> RunLock:
        """A lock of a process that lives."""
        lock = RunLock(self.path)
        lock.acquire()
        self.alive.append(lock)
        return lock

    def end(self, lock: RunLock) -> None:
        self.alive.remove(lock)
        lock.release()


Others = Callable[[World], list[RunLock]]  # what others do; they end up with these locks


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def world(request, monkeypatch, tmp_path) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(processes, "state", lambda holder: "unknown")
    monkeypatch.setattr(lock_file, "BEAT_S", 10**6)
    monkeypatch.setattr(lock_file, "STALE_S", 1.0)
    monkeypatch.setattr(lock_file, "_POLL_S", 0.3)
    monkeypatch.setattr(lock_file, "time", world)

    def stepwise(function):
        def call(*args, **kwargs):
            world.step()
            return function(*args, **kwargs)

        return call

    def no_link(source, target):
        raise PermissionError(1, "Operation not permitted")

    if not request.param:
        monkeypatch.setattr(os, "link", no_link)
    for name in STEPS:
        monkeypatch.setattr(os, name, stepwise(getattr(os, name)))
    monkeypatch.setattr(lock_file, "_read", stepwise(lock_file._read))
    return world


def holds(lock: RunLock) -> bool:
    try:
        lock.check()
    except UserError:
        return False
    return True


def take(world: World) -> list[RunLock]:
    """Others find the paused process silent, and one of them takes the lock."""
    return [world.new()]


def take_one_after_the_other(world: World) -> list[RunLock]:
    world.end(world.new())
    return [world.new()]


def find_taken(world: World) -> list[RunLock]:
    """One takes the lock, another one is refused."""
    holder = world.new()
    with pytest.raises(UserError, match="in use"):
        world.new()
    return [holder]


OTHERS = [take, take_one_after_the_other, find_taken]


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("stale", [True, False])
def test_who_pauses_while_taking_a_lock_never_takes_it_from_who_took_it(world, others, stale):
    for step in range(1, 1000):
        world.begin(stale)
        late = RunLock(world.path)
        with world.paused_before(step, others):
            try:
                late.acquire()
                believes = True
            except UserError:
                believes = False
        if world.holders is None:
            assert step > 5  # it has not paused: there are no more steps
            return
        (holder,) = world.holders
        assert holds(holder), f"step {step}"
        assert not (believes and holds(late)), f"step {step}"
        late.release()
        assert holds(holder), f"step {step}"
        world.end(holder)
        assert not os.path.exists(world.folder) or not os.listdir(world.folder), f"step {step}"


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("stale", [True, False])
def test_who_pauses_while_releasing_a_lock_never_removes_anothers(world, others, stale):
    for step in range(1, 1000):
        world.begin(stale)
        late = RunLock(world.path)
        late.acquire()
        with world.paused_before(step, others):
            late.release()
        if world.holders is None:
            assert step > 5
            return
        (holder,) = world.holders
        assert holds(holder), f"step {step}"
        with pytest.raises(UserError, match="in use"):
            RunLock(world.path).acquire()
        world.end(holder)
        assert not os.path.exists(world.folder) or not os.listdir(world.folder), f"step {step}"


@pytest.mark.parametrize("stale", [True, False])
def test_files_and_folders_that_vanish_are_made_again(world, stale):
    """Others remove what looks like a remnant of theirs, and the folder that this leaves empty."""

    def tidy(world: World) -> list[RunLock]:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(world.folder):
                if name.endswith(".tmp"):
                    os.remove(os.path.join(world.folder, name))
        with contextlib.suppress(OSError):
            os.rmdir(world.folder)
        return []

    for step in range(1, 1000):
        world.begin(stale)
        lock = RunLock(world.path)
        with world.paused_before(step, tidy):
            lock.acquire()
        lock.check()
        lock.release()
        if world.holders is None:
            assert step > 5
            return


def test_a_mark_in_its_own_file_tells_a_holder_what_a_cached_folder_hides(world, monkeypatch):
    holder = RunLock(world.path)
    holder.acquire()
    taker = world.new()
    monkeypatch.setattr(holder, "_chain", lambda: RunLock._chain(holder)[:1])
    assert holds(taker)
    with pytest.raises(UserError, match="was taken over by process"):
        holder.check()


def test_a_heartbeat_never_goes_to_another_file_of_the_same_number(world):
    lock = world.new()
    thread = lock._heart
    world.end(lock)
    assert not thread.is_alive()  # it has closed its file itself
