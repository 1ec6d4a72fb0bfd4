"""What image_train.py --dry_run predicts against what a real run takes.

    python benchmarks/dry_run.py flags/demo.sh flags/unet_small.sh [--steps 30] [--clock cpu]

For each flags file a dry run and then a real one, each in a process of its own: seconds per step
(of the real run the median), seconds of the whole run, peak memory and the size of a checkpoint.
Halfway and at the end it saves; at the end it draws a grid of samples.
"""

import dataclasses
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import measuring

from guided_diffusion import dist_util
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.preparation.phantoms import write_dataset
from guided_diffusion.runtime.command_line.flags import Overrides, flag, from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import diffusion, guidance
from guided_diffusion.training.config import GuidedTrainConfig
from guided_diffusion.training.dry_run import dry_run
from guided_diffusion.training.trial import peak_memory

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Benchmark settings."""

    TITLE = "Benchmark"

    data_dir: str = flag(
        "", "folder of images; '': 200 generated ones of 300x300 pixels", basic=True
    )
    steps: int = flag(30, "steps of the real run", least=2, basic=True)
    clock: str = flag(
        "wall",
        "wall, or cpu: processor time, steadier on a busy CPU",
        choices=tuple(CLOCKS),
        basic=True,
    )
    more: str = flag("", "further flags for both runs, in quotes", basic=True)
    json: str = flag("", "also write the results to this JSON file", basic=True)


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ("predicted", "real"):
        print(json.dumps(run_one(*sys.argv[1:3], sys.argv[3:])))
        return 0
    parser = make_parser(__doc__, Settings)
    parser.add_argument("files", nargs="+", help="flags files, such as flags/demo.sh")
    overrides = parse_flags(parser)
    settings = from_flags(Settings, overrides)
    lines = []
    print(f"{'file':16} {'':12} {'predicted':>12} {'real':>12} {'ratio':>7}")
    for file in overrides["files"]:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(compare(file, settings, folder))
    measuring.write_json(settings.json, {"steps": settings.steps, "lines": lines})
    return 0


def compare(file: str, settings: Settings, folder: str) -> dict[str, object]:
    """Print and return predicted and real figures for the flags in a file."""
    words = words_of(file)
    data_dir = settings.data_dir
    if not data_dir:
        write_dataset(folder, 200, 0, 0, size=(300, 300), seed=1)
        data_dir = os.path.join(folder, "unlabelled")
    every = str(max(1, settings.steps // 2))
    flags = [*words, "--data_dir", data_dir, "--max_steps", str(settings.steps)]
    flags += ["--save_interval", every, "--sample_interval", str(settings.steps)]
    flags += shlex.split(settings.more)
    found = {}
    for kind in ("predicted", "real"):
        run = os.path.join(folder, "run")
        done = subprocess.run(
            [sys.executable, __file__, kind, settings.clock, *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "OPENAI_LOGDIR": run},
        )
        if done.returncode:
            raise UserError(f"{file}: the {kind} run failed: {done.stderr.strip()[-500:]}")
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    name = os.path.basename(file)
    for unit, predicted in found["predicted"].items():
        real = found["real"][unit]
        ratio = predicted / real
        print(f"{name:16} {unit:12} {predicted:12.4g} {real:12.4g} {ratio:7.3f}", flush=True)
    return {"file": name, **found}


def words_of(file: str) -> list[str]:
    """The flags of training that a flags file sets, as bash gives them.

    :raises UserError: if bash cannot read it.
    """
    script = 'source "$1" && printf "%s\\n" $MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS'
    done = subprocess.run(
        ["bash", "-c", script, "bash", os.path.abspath(file)], capture_output=True, text=True
    )
    if done.returncode or not done.stdout.strip():
        raise UserError(f"{file} sets no flags: {done.stderr.strip() or 'name a file of flags/'}")
    return done.stdout.split()


def run_one(kind: str, clock_name: str, argv: Sequence[str]) -> dict[str, float]:
    """The figures of a dry run or a real one with these flags, in this process."""
    clock = CLOCKS[clock_name]
    parser = make_parser(None, GuidedTrainConfig, GuidedConfig, DiffusionConfig, ReadingConfig)
    overrides = parse_flags(parser, argv)
    dist_util.setup_dist()
    guided = overrides.get("segmentation_guided", False)
    if kind == "real":
        return real_run(overrides, guided, clock)
    estimate = dry_run(overrides, GuidedConfig if guided else ModelConfig, clock)
    schedule = estimate.schedule
    return {
        "s per step": schedule.per_step,
        "s in all": schedule.seconds(),
        "GiB": estimate.memory.peak / 2**30,
        "MB saved": schedule.costs.checkpoint_bytes / 1e6,
    }


def real_run(overrides: Overrides, guided: bool, clock) -> dict[str, float]:
    """Train, noting when each step begins."""
    imported, began = time.process_time(), clock()
    begins = []
    run_step = TrainLoop.run_step

    def noted(loop, *arguments) -> None:
        begins.append(clock())
        run_step(loop, *arguments)

    TrainLoop.run_step = noted
    (guidance if guided else diffusion).train(overrides)
    seconds = imported + clock() - began
    folder = os.environ["OPENAI_LOGDIR"]
    last = f"{overrides['max_steps']:06d}.pt"
    sizes = [os.path.getsize(entry) for entry in os.scandir(folder) if entry.name.endswith(last)]
    return {
        "s per step": statistics.median(b - a for a, b in itertools.pairwise(begins)),
        "s in all": seconds,
        "GiB": peak_memory() / 2**30,
        "MB saved": sum(sizes) / 1e6,
    }


if __name__ == "__main__":
    command(main)()
