"""Killed, stopped, out of space: the same command resumes as if nothing had happened.

Commands run as processes of their own. `DISTURB` in their environment says what is to happen to
them; see `disturbed`.
"""

import csv
import errno
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image
from process_util import (
    HOST,
    LAUNCHERS,
    LONGEST_S,
    ROOT,
    Command,
    small_disk,
    torchrun_environments,
)

from guided_diffusion import dist_util
from guided_diffusion.runtime.ranks import failure
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.runtime.storage import checkpoint, files

FLAGS = """
    --image_size 8 --num_channels 16 --channel_mult 1 --num_res_blocks 1 --num_head_channels 8
    --attention_resolutions 8 --learn_sigma True --noise_schedule cosine --diffusion_steps 20
    --global_batch_size 4 --microbatch 1 --max_steps 14 --save_interval 4 --log_interval 3
    --sample_interval 0 --keep_checkpoints 2 --ema_rate 0.9,0.99 --weight_decay 0.01 --lr 1e-3
    --dropout 0.1 --random_flip True
""".split()  # noqa: SIM905 - as on a command line


def disturbed() -> None:
    """Do what `DISTURB` says, a rank or "all" before it:

    ACTION step N: at the start of step N. ACTION before|within|after FILE: when FILE is written.
    ACTION without FILE: when FILE was removed.
    The actions: a signal; "sleep" as long as a file "asleep" is there; "full", a full disk.
    """
    if not os.environ.get("DISTURB"):
        return
    from guided_diffusion.train_util import TrainLoop

    rank, action, when, *more = os.environ["DISTURB"].split()
    step, write, remove = TrainLoop.run_step, files.write_atomically, checkpoint.bf.remove

    def act():
        if rank not in ("all", str(dist_util.rank())):
            return
        if action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if action == "sleep":
            asleep = Path(os.environ["OPENAI_LOGDIR"], "asleep")
            asleep.touch()
            while asleep.exists():
                time.sleep(0.02)
        else:
            os.kill(os.getpid(), getattr(signal, action))

    def run_step(self, batch, cond):
        if self.step == int(more[0]):
            act()
        step(self, batch, cond)

    def write_half(fill, file):
        whole = io.BytesIO()
        fill(whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        act()

    def write_atomically(path, fill):
        here = os.path.basename(path) == more[0]
        if here and when == "before":
            act()
        if here and when == "within":
            write(path, lambda file: write_half(fill, file))
        else:
            write(path, fill)
        if here and when == "after":
            act()

    def remove_and_act(path):
        remove(path)
        if os.path.basename(path) == more[0]:
            act()

    if when == "step":
        TrainLoop.run_step = run_step
    elif when == "without":
        checkpoint.bf.remove = remove_and_act
    else:
        checkpoint.write_atomically = files.write_atomically = write_atomically


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(9):
        pixels = np.kron(rng.integers(0, 256, (4, 4)), np.ones((2, 2)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def start(folder, images, disturb: str = "", num_ranks: int = 1, more=()) -> list[Command]:
    environments = torchrun_environments(num_ranks) if num_ranks > 1 else [{}]
    return [
        Command(
            "image_train.py",
            [*FLAGS, "--data_dir", str(images), *more],
            {"OPENAI_LOGDIR": str(folder), "DISTURB": disturb, **own},
            folder.with_name(f"{folder.name}_said_{rank}.txt"),
            disturbed,
        )
        for rank, own in enumerate(environments)
    ]


def run(folder, images, disturb: str = "", num_ranks: int = 1, more=()) -> list[int]:
    """Exit codes of the ranks."""
    return [command.wait() for command in start(folder, images, disturb, num_ranks, more)]


def said(folder, rank: int = 0) -> str:
    return folder.with_name(f"{folder.name}_said_{rank}.txt").read_text()


def errors(folder, num_ranks: int = 1) -> list[str]:
    text = "".join(said(folder, rank) for rank in range(num_ranks))
    return re.findall("error: .*", text)  # a progress bar may stand before it


def losses(folder) -> list[dict[str, str]]:
    """The rows of the table without what depends on the clock."""
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    clock = ("seconds_per_step", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def assert_undisturbed(folder, undisturbed) -> None:
    """Weights, averages, optimizer, the state of all else and the table: the same to the bit."""
    prefixes = ("model", "ema_0.9_", "ema_0.99_", "opt", "state")
    for name in (f"{prefix}0000{step}.pt" for prefix in prefixes for step in (12, 14)):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert losses(folder) == losses(undisturbed)
    assert [row["step"] for row in losses(folder)] == ["3", "6", "9", "12"]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, images) == [0], said(folder)
    return folder


@pytest.fixture(scope="module")
def whole_of_two(images, tmp_path_factory):
    """An undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("whole_of_two") / "run"
    assert run(folder, images, num_ranks=2) == [0, 0], said(folder)
    return folder


class TestKilled:
    def test_at_any_moment(self, images, whole, tmp_path):
        folder = tmp_path / "run"
        newest = []
        for moment in (
            "within config.json",
            "step 3",
            "within model000004.pt",
            "before state000004.pt",
            "after state000004.pt",
            "within state000008.pt",
            "within opt000012.pt",
            "without state000004.pt",
            "step 13",
        ):
            assert run(folder, images, f"0 SIGKILL {moment}") == [-9], said(folder)
            newest.append((checkpoint.complete_steps(str(folder)) or [0])[-1])
            if moment == "step 13":  # a row that was not written to its end
                with open(folder / "progress.csv", "a") as file:
                    file.write("0.5,0.25")
        assert newest == [0, 0, 0, 0, 4, 4, 8, 12, 12]
        assert run(folder, images) == [0], said(folder)
        assert_undisturbed(folder, whole)
        assert not list(folder.glob(".*"))  # what was half-written is gone
        assert {path.name for path in folder.glob("state*")} == {"state000012.pt", "state000014.pt"}
        assert (folder / "log.txt").read_text().count("resuming from ") == 5

    def test_two_ranks(self, images, whole_of_two, tmp_path):
        folder = tmp_path / "run"
        for moment, codes in (
            ("1 SIGKILL step 2", [1, -9]),
            ("0 SIGKILL within ema_0.9_000008.pt", [-9, 1]),
            ("all SIGKILL step 13", [-9, -9]),
        ):
            began = time.monotonic()
            commands = start(folder, images, moment, 2)
            commands[codes.index(-9)].wait()
            killed = time.monotonic()
            assert [command.wait() for command in commands] == codes, said(folder)
            # the others notice: within seconds, allowing for a machine that is slow just now
            assert time.monotonic() - killed < 5 + 2 * (killed - began)
            if codes.count(-9) == 1:
                rank = codes.index(-9)
                assert errors(folder, 2)[-1] == f"error: rank {rank} ({HOST}): {failure.DIED}"
        assert run(folder, images, num_ranks=2) == [0, 0], said(folder)
        assert_undisturbed(folder, whole_of_two)


class TestSignals:
    def test_they_end_a_run_that_can_go_on(self, images, whole, tmp_path):
        folder = tmp_path / "run"
        for name, at, saved in (("SIGTERM", 2, 4), ("SIGUSR1", 5, 7), ("SIGINT", 9, 11)):
            assert run(folder, images, f"0 {name} step {at}") == [EXIT_STOPPED], said(folder)
            assert checkpoint.complete_steps(str(folder))[-1] == saved
            log = (folder / "log.txt").read_text()
            assert f"stopped by {name}: rerun the command to resume" in log
        assert run(folder, images) == [0], said(folder)
        assert_undisturbed(folder, whole)
        assert errors(folder) == []

    def test_one_rank_stops_all(self, images, whole_of_two, tmp_path):
        folder = tmp_path / "run"
        assert run(folder, images, "1 SIGTERM step 5", 2) == [EXIT_STOPPED] * 2, said(folder)
        assert "stopped by a signal on another rank" in (folder / "log.txt").read_text()
        assert run(folder, images, num_ranks=2) == [0, 0], said(folder)
        assert_undisturbed(folder, whole_of_two)
        assert errors(folder, 2) == []

    def test_the_second_interrupt_ends_it_at_once(self, images, tmp_path):
        folder = tmp_path / "run"
        (command,) = start(folder, images, "0 sleep step 6")
        command.wait_for((folder / "asleep").exists)
        command.send("SIGINT")
        time.sleep(0.7)  # sooner, it would count as the same key press
        assert command.process.is_alive()
        command.send("SIGINT")
        began = time.monotonic()
        assert command.wait() not in (0, EXIT_STOPPED)
        assert time.monotonic() - began < 30
        assert checkpoint.complete_steps(str(folder)) == [4]

    def test_also_to_all_processes_of_a_rank(self, images, whole, tmp_path):
        """A batch system signals a job's reading processes as well."""
        folder = tmp_path / "run"
        more = ["--num_workers", "1"]
        (command,) = start(folder, images, "0 sleep step 6", more=more)
        command.wait_for((folder / "asleep").exists)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(command.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        assert len(children) == 1
        for name in ("SIGUSR1", "SIGTERM"):
            os.kill(int(children[0]), getattr(signal, name))
            command.send(name)
        (folder / "asleep").unlink()
        assert command.wait() == EXIT_STOPPED, command.said
        assert run(folder, images, more=more) == [0], said(folder)
        assert_undisturbed(folder, whole)


class TestTrouble:
    @pytest.mark.parametrize("num_ranks", [1, 2])
    def test_a_full_disk(self, images, whole, whole_of_two, tmp_path, num_ranks):
        folder = tmp_path / "run"
        codes = run(folder, images, "0 full within ema_0.99_000008.pt", num_ranks)
        assert codes == [2] * num_ranks, said(folder)
        (line,) = errors(folder, num_ranks)
        assert "no space left to write" in line
        assert "ema_0.99_000008.pt: free some and rerun the command" in line
        assert checkpoint.newest_state(str(folder))[0] == 4
        assert run(folder, images, num_ranks=num_ranks) == [0] * num_ranks, said(folder)
        assert_undisturbed(folder, whole if num_ranks == 1 else whole_of_two)

    def test_a_disk_that_is_full_indeed(self, images, tmp_path):
        folder = tmp_path / "small"
        with small_disk(folder, "1800k"):
            assert run(folder, images, more=["--keep_checkpoints", "0"]) == [2], said(folder)
            (line,) = errors(folder)
            assert "no space left to write" in line
            assert checkpoint.newest_state(str(folder))[0] in (4, 8)

    def test_a_damaged_checkpoint(self, images, whole, tmp_path):
        folder = tmp_path / "run"
        assert run(folder, images, "0 SIGKILL step 10") == [-9], said(folder)
        damaged = folder / "ema_0.9_000008.pt"
        damaged.write_bytes(damaged.read_bytes()[:-100])
        assert run(folder, images) == [0], said(folder)
        assert "checkpoint at step 8 is unusable: " in said(folder)
        log = (folder / "log.txt").read_text()
        assert f"resuming from {folder / 'model000004.pt'} at step 4" in log
        assert_undisturbed(folder, whole)


# Fine-tuning

TUNING = """
    --epochs 6 --batch_size 2 --out_channels 3 --lr 1e-3 --augmentation heavy --dropout 0.1
    --weights_save segm.pth
""".split()  # noqa: SIM905 - as on a command line


def again_and_again() -> None:
    """Go on in a child for each of `DISTURBANCES`, saving every epoch instead of every minute.

    One after the other; so what takes seconds to import is imported once. The codes of their ends
    go to a file.
    """
    from guided_diffusion.segmentation.training import finetune, loop  # noqa: F401 - for the children

    os.chdir(os.environ["OPENAI_LOGDIR"])
    loop.SAVE_EVERY = 0.0
    for disturbance in os.environ["DISTURBANCES"].split(","):
        os.environ["DISTURB"] = disturbance
        child = os.fork()
        if child == 0:
            return disturbed()
        _, status = os.waitpid(child, 0)
        with open("codes", "a") as file:
            file.write(f"{os.waitstatus_to_exitcode(status)} ")
    os._exit(0)


def tune(folder, arguments, *disturbances: str) -> list[int]:
    """Exit codes of finetune.py, started anew after each disturbance."""
    folder.mkdir()
    env = {"OPENAI_LOGDIR": str(folder), "DISTURBANCES": ",".join([*disturbances, ""])}
    said_to = folder.with_name(f"{folder.name}_said_0.txt")
    command = Command("finetune.py", [*TUNING, *arguments], env, said_to, again_and_again)
    assert command.wait() == 0, command.said
    return [int(code) for code in (folder / "codes").read_text().split()]


def test_fine_tuning_goes_on_as_well(pretrained, split, tmp_path):
    folders = (split / part / kind for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK"))
    arguments = [str(pretrained), *map(str, folders)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tune(whole, arguments, "") == [0, 0], said(whole)
    codes = tune(
        parts,
        arguments,
        "0 SIGKILL after segm.pth",  # saved for the first time, and nothing to go on from
        "0 SIGKILL after segm_last.pth",
        "0 SIGKILL within segm_last.pth",
        "0 SIGKILL before segm.pth",
        "0 SIGTERM after segm_last.pth",
    )
    assert codes == [-9, -9, -9, -9, EXIT_STOPPED, 0], said(parts)
    for name in ("segm.pth", "segm_last.pth"):
        ours, theirs = (checkpoint.load(str(folder / name)) for folder in (parts, whole))
        assert ours.keys() == theirs.keys()
        for key, value in ours["state_dict"].items():
            assert th.equal(value, theirs["state_dict"][key]), f"{name} {key}"
        assert ours["best"] == theirs["best"]
    assert losses(parts / "segm_logs") == losses(whole / "segm_logs")
    assert [row["epoch"] for row in losses(parts / "segm_logs")] == list("123456")
    assert said(whole).count("this run is complete: nothing to do") == 1


# Without MPI

EVERY_SCRIPT = """
    import os, runpy, sys

    folder, images, scripts = sys.argv[1:4]
    split = sys.argv[4:]
    os.environ["OPENAI_LOGDIR"] = folder
    sys.path.insert(0, scripts)

    def run(name, *arguments):
        sys.argv = [name, *arguments]
        try:
            runpy.run_path(os.path.join(scripts, name), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{name}: {end.code}"

    model = os.path.join(folder, "model000002.pt")
    run("image_train.py", "--data_dir", images, *os.environ["FLAGS"].split())
    run("image_sample.py", "--model_path", model, "--num_samples", "1", "--steps", "2")
    run("finetune.py", model, *split, "--epochs", "1", "--weights_save", folder + "/segm.pth")
    print("all done")
"""


@pytest.mark.parametrize("mpi4py", ["not there", "without an MPI library"])
def test_one_process_needs_no_mpi(images, split, tmp_path, mpi4py):
    fake = tmp_path / "fake" / "mpi4py"
    fake.mkdir(parents=True)
    if mpi4py == "not there":
        (fake / "__init__.py").write_text("raise ModuleNotFoundError('no mpi4py', name='mpi4py')")
    else:
        (fake / "__init__.py").write_text("")
        (fake / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(EVERY_SCRIPT))
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    more = {"FLAGS": " ".join([*FLAGS, "--max_steps 2"]), "OPENAI_LOG_FORMAT": "log,csv"}
    path = os.pathsep.join([str(fake.parent), str(ROOT)])
    ended = subprocess.run(
        [
            sys.executable,
            str(program),
            str(tmp_path / "run"),
            str(images),
            str(ROOT / "scripts"),
            str(split / "TRAIN" / "IMG"),
            str(split / "TRAIN" / "MASK"),
        ],
        env=env | more | {"PYTHONPATH": path, "GUIDED_DIFFUSION_DEVICE": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "all done" in ended.stdout
    assert (tmp_path / "run" / "segm.pth").exists()
