"""Kill a training with SIGKILL again and again: does it end as if nothing had happened?

    python benchmarks/kill_and_resume.py [--kills 20] [--ranks 1,2] [--json OUT.json]

First an undisturbed run, then one that is killed at random moments, every other time in the middle
of saving, and started by the same command each time. Weights, averages, optimizer state and logged
losses must be the same to the bit (CPU, float32). With two ranks, one of them is killed, and the
other must end by itself.
"""

import argparse
import csv
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import command

SCRIPT = Path(__file__).parents[1] / "scripts" / "image_train.py"
FLAGS = """
    --image_size 16 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --num_head_channels 16
    --attention_resolutions 8 --learn_sigma True --noise_schedule cosine --diffusion_steps 50
    --global_batch_size 4 --microbatch 1 --dropout 0.1 --random_flip True --weight_decay 0.01
    --lr 1e-3 --ema_rate 0.9,0.99 --log_interval 3 --save_interval 10 --sample_interval 0
    --num_workers 0
""".split()  # noqa: SIM905 - as on a command line
FILES = ("model", "ema_0.9_", "ema_0.99_", "opt", "state")
CLOCK = ("seconds_per_step", "images_per_second")  # columns that no two runs share
LONGEST_S = 1800.0  # a training that takes longer hangs


class Job:
    """A training on some ranks, started as torchrun would start it."""

    def __init__(self, folder: Path, images: Path, ranks: int, steps: int):
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
                own = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                env |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in own.items()}}
            arguments = [*FLAGS, "--data_dir", str(images), "--max_steps", str(steps)]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), *arguments],
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=open(folder.with_name(f"said_{rank}.txt"), "ab"),  # noqa: SIM115
                )
            )

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait(self) -> list[int]:
        try:
            return [process.wait(LONGEST_S) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def rows(folder: Path) -> list[dict[str, str]]:
    """The logged figures, without those of the clock."""
    path = folder / "progress.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def half_written(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if re.fullmatch(r"\..*\.tmp", name)]


def newest(folder: Path) -> int:
    return (checkpoint.complete_steps(str(folder)) or [0])[-1]


def saving(folder: Path, prefix: str):
    """Whether such a file is being written."""
    return lambda: any(name.startswith(f".{prefix}") for name in half_written(folder))


def wait_for(happened, job: Job, pause: float = 0.002) -> bool:
    """Until `happened()`; False if the job ended before."""
    while job.running():
        if happened():
            return True
        time.sleep(pause)
    return False


def started(job: Job, before: int, step: float = 0):
    """Whether the log has grown, and up to this step."""

    def reached() -> bool:
        logged = rows(job.folder)
        return len(logged) > before and int(logged[-1]["step"] or 0) >= step

    return reached


def undisturbed(folder: Path, images: Path, ranks: int, steps: int) -> float:
    """Train without a kill; the seconds from the first logged step to the end."""
    job = Job(folder, images, ranks, steps)
    wait_for(started(job, 0), job)
    since = time.perf_counter()
    codes = job.wait()
    if any(codes):
        raise RuntimeError(f"the undisturbed run ended with {codes}: see {folder.parent}")
    return time.perf_counter() - since


def disturbed(folder: Path, images: Path, ranks: int, steps: int, kills: int, seconds: float):
    """Train with kills; a line for each. `seconds`: how long the whole training takes."""
    moments = random.Random(ranks)
    lines = []
    while len(lines) < kills:
        in_saving = len(lines) % 2 == 1
        job = Job(folder, images, ranks, steps)
        before = len(rows(folder))
        # a random moment in the training's next part, so that every kill moves on
        target = (len(lines) + moments.random()) * steps / (kills + 1)
        going = wait_for(started(job, before, target), job)
        if going:
            time.sleep(moments.uniform(0, 10 * seconds / steps))
        if going and in_saving:
            # a busy loop, since a file is half-written for milliseconds only
            going = wait_for(saving(folder, moments.choice(FILES)), job, 0)
        victim = moments.randrange(ranks)
        job.processes[victim].send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        codes = job.wait()
        if codes[victim] != -signal.SIGKILL:
            raise RuntimeError(f"the run was over before {kills} kills: give it more --steps")
        if ranks > 1 and 0 in codes:
            raise RuntimeError(f"a rank went on without the killed one: exit codes {codes}")
        lines.append(
            {
                "rank": victim,
                "half_written": half_written(folder),
                "newest": newest(folder),
                "logged": int(rows(folder)[-1]["step"]),
                "others_ended_after": time.perf_counter() - killed if ranks > 1 else None,
            }
        )
        last = lines[-1]
        print(
            f"kill {len(lines):3}: rank {victim}, logged step {last['logged']}, newest checkpoint"
            f" {last['newest']}, half-written: {', '.join(last['half_written']) or 'nothing'}",
            flush=True,
        )
    codes = Job(folder, images, ranks, steps).wait()
    if any(codes):
        raise RuntimeError(f"the last start ended with {codes}: see {folder.parent}")
    return lines


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What the two runs' last checkpoints and logs do not share."""
    names = [checkpoint.step_name(prefix, steps) for prefix in FILES]
    found = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    return found + ["progress.csv"] * (rows(one) != rows(other))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", default="1,2", help="numbers of processes to try")
    parser.add_argument("--steps", type=int, default=400, help="of the whole training")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    reports, wrong = [], []
    for ranks in map(int, args.ranks.split(",")):
        with tempfile.TemporaryDirectory() as work:
            images, whole, parts = (Path(work, name) for name in ("images", "whole", "parts"))
            images.mkdir()
            pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16), np.uint8)
            for number, picture in enumerate(pixels):
                Image.fromarray(picture).save(images / f"{number}.png")
            print(f"{ranks} rank(s): the undisturbed run", flush=True)
            seconds = undisturbed(whole, images, ranks, args.steps)
            lines = disturbed(parts, images, ranks, args.steps, args.kills, seconds)
            different = differences(whole, parts, args.steps)
        in_saving = sum(bool(line["half_written"]) for line in lines)
        print(
            f"{ranks} rank(s), {len(lines)} kills, {in_saving} of them in the middle of saving: "
            + (f"DIFFERENT: {', '.join(different)}" if different else "the same to the bit")
        )
        wrong += different
        reports.append({"ranks": ranks, "different": different, "kills": lines})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(reports, file, indent=2)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(command(main)())
