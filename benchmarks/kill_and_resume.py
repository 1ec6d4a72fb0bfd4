"""Kill a training run repeatedly with SIGKILL and check that it ends as an undisturbed run does.

    python benchmarks/kill_and_resume.py [--kills 20] [--ranks 1,2] [--starts 20] [--precision bf16]
        [--more "--align_encoder efficientnet-lite0"] [--json OUT.json]

Trains once undisturbed and once killed at random moments, every other time in the middle of saving,
rerunning the same command to resume. Weights, EMA, optimizer state and logged losses must be
bit-identical (on a CPU). With two ranks, one is killed and the other must exit by itself.

With --starts, the command is also given twice at the same moment, each time in a new folder: one
must train to the same end, and the other end in one line.
"""

import argparse
import csv
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.runtime.storage.files import save_json

SCRIPT = Path(__file__).parents[1] / "scripts" / "image_train.py"
FLAGS = """
    --image_size 16 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --num_head_channels 16
    --attention_resolutions 8 --learn_sigma True --noise_schedule cosine --diffusion_steps 50
    --global_batch_size 4 --microbatch 1 --dropout 0.1 --random_flip True --weight_decay 0.01
    --lr 1e-3 --ema_rate 0.9,0.99 --log_interval 3 --save_interval 10 --sample_interval 0
    --num_workers 0
""".split()  # noqa: SIM905 - reads as a command line
FILES = ("model", "ema_0.9_", "ema_0.99_", "opt", "state")
TIMINGS = ("seconds_per_step", "images_per_second")  # logged columns that differ between runs
TIMEOUT_S = 1800.0  # after which a training run counts as hung


class Job:
    """A training run on one or more ranks, launched as torchrun would."""

    def __init__(self, folder: Path, images: Path, ranks: int, steps: int, log: str = "stderr"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.folder = folder
        self.processes = []
        for rank in range(ranks):
            env = os.environ | {
                "OPENAI_LOGDIR": str(folder),
                "OMP_NUM_THREADS": "1",
                "GUIDED_DIFFUSION_DEVICE": "cpu",
            }
            if ranks > 1:
                variables = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                env |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in variables.items()}}
            arguments = [*FLAGS, "--data_dir", str(images), "--max_steps", str(steps)]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), *arguments],
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=open(folder.with_name(f"{log}_{rank}.txt"), "ab"),  # noqa: SIM115
                )
            )

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait(self) -> list[int]:
        try:
            return [process.wait(TIMEOUT_S) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def logged_rows(folder: Path) -> list[dict[str, str]]:
    """The logged rows, without the timings."""
    path = folder / "progress.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def partial_files(folder: Path) -> list[str]:
    """Names of the temporary files that are being written."""
    return [name for name in os.listdir(folder) if re.fullmatch(r"\..*\.tmp", name)]


def newest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    return (checkpoint.complete_steps(str(folder)) or [0])[-1]


def is_saving(folder: Path, prefix: str):
    """A condition for `wait_for`: a file of this kind is being written."""
    return lambda: any(name.startswith(f".{prefix}") for name in partial_files(folder))


def wait_for(condition, job: Job, poll_s: float = 0.002) -> bool:
    """Wait until `condition()` holds; False if the job ended first."""
    while job.running():
        if condition():
            return True
        time.sleep(poll_s)
    return False


def has_logged(job: Job, before: int, step: float = 0):
    """A condition for `wait_for`: the log has more than `before` rows and has reached `step`."""

    def reached() -> bool:
        logged = logged_rows(job.folder)
        return len(logged) > before and int(logged[-1]["step"] or 0) >= step

    return reached


def train_undisturbed(folder: Path, images: Path, ranks: int, steps: int) -> float:
    """Train without kills; returns the seconds from the first logged step to the end."""
    job = Job(folder, images, ranks, steps)
    wait_for(has_logged(job, 0), job)
    start = time.perf_counter()
    codes = job.wait()
    if any(codes):
        raise RuntimeError(f"the undisturbed run ended with {codes}: see {folder.parent}")
    return time.perf_counter() - start


def train_with_kills(
    folder: Path, images: Path, ranks: int, steps: int, kills: int, seconds: float
) -> list[dict]:
    """Train with this many kills; returns a record of each.

    :param seconds: how long the undisturbed run took.
    """
    rng = random.Random(ranks)
    lines = []
    while len(lines) < kills:
        while_saving = len(lines) % 2 == 1
        job = Job(folder, images, ranks, steps)
        before = len(logged_rows(folder))
        # a random moment in the next part of the run, so that there is progress between kills
        target = (len(lines) + rng.random()) * steps / (kills + 1)
        running = wait_for(has_logged(job, before, target), job)
        if running:
            time.sleep(rng.uniform(0, 10 * seconds / steps))
        if running and while_saving:
            # busy-wait, since files are partial for milliseconds only
            running = wait_for(is_saving(folder, rng.choice(FILES)), job, 0)
        victim = rng.randrange(ranks)
        job.processes[victim].send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        codes = job.wait()
        if codes[victim] != -signal.SIGKILL:
            raise RuntimeError(f"the run finished before {kills} kills: raise --steps")
        if ranks > 1 and 0 in codes:
            raise RuntimeError(f"a rank finished without the killed one: exit codes {codes}")
        lines.append(
            {
                "rank": victim,
                "half_written": partial_files(folder),
                "newest": newest_step(folder),
                "logged": int(logged_rows(folder)[-1]["step"]),
                "others_ended_after": time.perf_counter() - killed if ranks > 1 else None,
            }
        )
        last = lines[-1]
        print(
            f"kill {len(lines):3}: rank {victim}, logged step {last['logged']}, newest checkpoint"
            f" {last['newest']}, partial files: {', '.join(last['half_written']) or 'none'}",
            flush=True,
        )
    codes = Job(folder, images, ranks, steps).wait()
    if any(codes):
        raise RuntimeError(f"the last resume ended with {codes}: see {folder.parent}")
    return lines


def start_twice(folder: Path, images: Path, ranks: int, steps: int) -> float:
    """Give the command twice at the same moment; returns the seconds until one is refused.

    :raises RuntimeError: unless one trains to the end, and the other ends in one line with code 2.
    """
    jobs = [Job(folder, images, ranks, steps, f"{folder.name}_{k}") for k in range(2)]
    began = time.perf_counter()
    while all(job.running() for job in jobs) and time.perf_counter() - began < TIMEOUT_S:
        time.sleep(0.002)
    seconds = time.perf_counter() - began
    refused, trains = sorted(jobs, key=Job.running)
    codes = refused.wait(), trains.wait()
    said = folder.with_name(f"{folder.name}_{jobs.index(refused)}_0.txt").read_text()
    lines = [line for line in said.splitlines() if "is in use by process" in line]
    if set(codes[0]) != {2} or set(codes[1]) != {0} or len(lines) != 1 or "Traceback" in said:
        raise RuntimeError(f"exit codes {codes}, and one said: {said}")
    return seconds


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """Names of the files of the last checkpoint and the log in which the two runs differ."""
    names = [checkpoint.step_name(prefix, steps) for prefix in FILES]
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    return different + ["progress.csv"] * (logged_rows(one) != logged_rows(other))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills per number of ranks")
    parser.add_argument(
        "--ranks", default="1,2", help="numbers of processes to test, comma-separated"
    )
    parser.add_argument(
        "--starts", type=int, default=0, help="starts of two commands at once, per number of ranks"
    )
    parser.add_argument("--steps", type=int, default=400, help="length of the training run")
    parser.add_argument("--precision", default="", help="of the runs, see image_train.py")
    parser.add_argument("--json", help="also write the results to this JSON file")
    parser.add_argument("--more", default="", help="further flags of the runs, in quotes")
    args = parser.parse_args()
    FLAGS.extend(["--precision", args.precision, *shlex.split(args.more)])
    reports, failed = [], False
    for ranks in map(int, args.ranks.split(",")):
        with tempfile.TemporaryDirectory() as work:
            images, reference, killed = (Path(work, n) for n in ("images", "reference", "killed"))
            images.mkdir()
            pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16), np.uint8)
            for number, picture in enumerate(pixels):
                Image.fromarray(picture).save(images / f"{number}.png")
            print(f"{ranks} rank(s): the undisturbed run", flush=True)
            seconds = train_undisturbed(reference, images, ranks, args.steps)
            lines = train_with_kills(killed, images, ranks, args.steps, args.kills, seconds)
            different = differences(reference, killed, args.steps)
            starts = []
            for number in range(args.starts):
                twice = Path(work, f"twice_{number}")
                starts.append(start_twice(twice, images, ranks, args.steps))
                lost = [f"{twice.name}/{n}" for n in differences(reference, twice, args.steps)]
                different += lost
                print(
                    f"start {number + 1:3}: one refused {starts[-1]:.1f} s after both began, the"
                    f" other trained to the end: {', '.join(lost) or 'bit-identical'}",
                    flush=True,
                )
        while_saving = sum(bool(line["half_written"]) for line in lines)
        print(
            f"{ranks} rank(s), {len(lines)} kills, {while_saving} of them in the middle of saving,"
            f" {len(starts)} double starts: "
            + (f"DIFFERENT: {', '.join(different)}" if different else "bit-identical")
        )
        failed |= bool(different)
        reports.append(
            {"ranks": ranks, "different": different, "kills": lines, "seconds_to_refusal": starts}
        )
    if args.json:
        save_json(args.json, reports)
    return int(failed)


if __name__ == "__main__":
    sys.exit(command(main)())
