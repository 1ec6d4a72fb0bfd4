"""Training losses in float16 and bfloat16 against those in float32, from the same weights.

    source flags/unet.sh
    python benchmarks/precision_losses.py --data_dir RADIOGRAPHS --seconds 100 --json losses.json
        --picture losses.png $MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS

Every precision sees the same images, timesteps and noise, so the curves can be compared step by
step. Ends with exit code 1 unless every loss is finite, the mean over the second half of the steps
is within --bound of float32's, and float16's loss scale has not fallen below 1.
"""

import copy
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import measuring
import torch as th

from guided_diffusion import logger
from guided_diffusion.image_datasets import load_data
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.runtime.command_line.flags import flag, from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.storage.resume import Start
from guided_diffusion.train_util import LoopConfig, TrainLoop

TIMED_STEPS = 3
WINDOW = 20  # steps that the plotted curves are averaged over
LOSSES = ("loss", "mse")


@dataclasses.dataclass(frozen=True)
class Settings(measuring.Settings):
    """Benchmark settings; the flags of network, diffusion and training define the run."""

    data_dir: str = flag("", "folder of radiographs", basic=True)
    precisions: str = flag(
        "fp32,fp16,bf16", "comma-separated, fp32 first; a CPU skips fp16", basic=True
    )
    steps: int = flag(300, "steps in each precision", least=2, basic=True)
    seconds: float = flag(
        0.0, "fewer steps where they would take longer in all; 0: no limit", basic=True
    )
    bound: float = flag(0.05, "largest deviation from float32, relative", least=0, basic=True)
    picture: str = flag("", "also plot the curves to this file", basic=True)


class Experiment:
    """One network, trained from the same weights on the same images in several precisions."""

    def __init__(self, settings: Settings, overrides: dict[str, Any], device: th.device):
        model = from_flags(ModelConfig, {"in_channels": 1, **overrides})
        self.settings, self.device = settings, device
        self.train = from_flags(LoopConfig, overrides)
        self.diffusion = from_flags(
            DiffusionConfig, {"learn_sigma": model.learn_sigma, **overrides}
        ).build()
        self.reading = ReadingConfig(model.image_size, model.in_channels)
        th.manual_seed(self.train.seed)
        self.network = model.build()

    def run(self, precision: str, steps: int) -> dict[str, Any]:
        """Train for so many steps; the losses of each, its seconds, and steps skipped."""
        batches = load_data(
            data_dir=self.settings.data_dir,
            batch_size=self.train.batch_size,
            image_size=self.reading.image_size,
            reading=self.reading,
            seed=self.train.seed,
            random_flip=False,
        )
        rows, seconds = [], []
        with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["csv"]):
            loop = TrainLoop(
                model=copy.deepcopy(self.network).to(self.device),
                diffusion=self.diffusion,
                data=iter(()),
                settings=self.train,
                start=Start(),
                precision=precision,
            )

            def step() -> None:
                loop.run_step(*next(batches))
                rows.append(logger.dumpkvs())

            for _ in range(steps):
                seconds.append(measuring.elapsed(step, self.device))
            values = {
                "seconds_per_step": statistics.median(seconds),
                "skipped_steps": loop.stepper.skipped()[1],
                "loss_scale": loop.stepper.loss_scale(),
            }
        return values | {name: [float(row[name]) for row in rows] for name in LOSSES}

    def affordable_steps(self, precisions: Sequence[str]) -> int:
        """As many of --steps as fit into --seconds, of which this takes some."""
        if not self.settings.seconds:
            return self.settings.steps
        began = time.perf_counter()
        trials = [self.run(precision, 1 + TIMED_STEPS) for precision in precisions]
        one_of_each = sum(trial["seconds_per_step"] for trial in trials)
        left = self.settings.seconds - (time.perf_counter() - began)
        steps = min(self.settings.steps, max(2, int(left / one_of_each)))
        if steps < self.settings.steps:
            print(
                f"{steps} of {self.settings.steps} steps: {self.settings.seconds:g} s allow no more"
                f" at {one_of_each:.3f} s for a step in each precision"
            )
        return steps


def compare(runs: dict[str, dict[str, Any]], bound: float) -> list[str]:
    """What is wrong with the losses: one line for each fault.

    Adds each run's deviation from float32: of the mean over the second half of the steps.
    """
    faults = []
    for precision, run in runs.items():
        run["deviation"] = {}
        for name in LOSSES:
            bad = sum(not math.isfinite(value) for value in run[name])
            if bad:
                faults.append(f"{precision}: {name} is not finite in {bad} of {len(run[name])}")
                continue
            ours, full = (
                statistics.fmean(r[name][len(r[name]) // 2 :]) for r in (run, runs["fp32"])
            )
            run["deviation"][name] = ours / full - 1
            if not abs(ours / full - 1) <= bound:
                faults.append(
                    f"{precision}: {name} {ours:.4g} over the second half of the steps, in fp32"
                    f" {full:.4g}: {ours / full - 1:+.1%}, allowed are {bound:.1%}"
                )
        if run["loss_scale"] < 1:
            faults.append(f"{precision}: the loss scale has fallen to {run['loss_scale']:g}")
    return faults


def for_json(run: dict[str, Any]) -> dict[str, Any]:
    """The run with None for losses that are not finite, which JSON has no numbers for."""
    return run | {
        name: [value if math.isfinite(value) else None for value in run[name]] for name in LOSSES
    }


def plot(path: str, runs: dict[str, dict[str, Any]]) -> None:
    """Plot the loss in each precision: as a mean over WINDOW steps, and every step's faintly."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for number, (precision, run) in enumerate(runs.items()):
        losses = run["loss"]
        firsts = range(0, len(losses), WINDOW)
        means = [statistics.fmean(losses[first : first + WINDOW]) for first in firsts]
        middles = [(first + min(first + WINDOW, len(losses)) + 1) / 2 for first in firsts]
        axes.plot(range(1, len(losses) + 1), losses, color=f"C{number}", alpha=0.15)
        axes.plot(middles, means, color=f"C{number}", marker=".", label=precision)
    axes.legend(title=f"mean of {WINDOW} steps")
    figure.savefig(path, dpi=120)


def chosen_precisions(text: str, device: th.device) -> list[str]:
    """Those of the comma-separated precisions that the device computes in."""
    wanted = text.split(",")
    if wanted[0] != "fp32" or not set(wanted) <= set(measuring.PRECISIONS):
        raise UserError(f"--precisions {text}: fp32, then any of fp16 and bf16, as in fp32,bf16")
    if device.type == "cpu" and "fp16" in wanted:
        print("fp16 skipped: it needs CUDA")
        wanted.remove("fp16")
    return wanted


def main() -> int:
    overrides = parse_flags(
        make_parser(__doc__, Settings, ModelConfig, DiffusionConfig, LoopConfig)
    )
    settings = from_flags(Settings, overrides)
    if not settings.data_dir:
        raise UserError("--data_dir names no folder: give one of radiographs")
    device = measuring.set_up_device(settings)
    precisions = chosen_precisions(settings.precisions, device)
    experiment = Experiment(settings, overrides, device)
    steps = experiment.affordable_steps(precisions)
    runs = {precision: experiment.run(precision, steps) for precision in precisions}
    faults = compare(runs, settings.bound)
    print(f"{'':5} {'s/step':>8} {'first':>8} {'last':>8} {'deviation':>10} {'skipped':>8}")
    for precision, run in runs.items():
        deviation = run["deviation"].get("loss", math.nan)
        print(
            f"{precision:5} {run['seconds_per_step']:8.3f} {run['loss'][0]:8.4f}"
            f" {run['loss'][-1]:8.4f} {deviation:+10.2%} {run['skipped_steps']:8}"
        )
    values = {"device": measuring.describe(device), "steps": steps, "wanted": settings.steps}
    values |= {"bound": settings.bound, "faults": faults}
    values["runs"] = {precision: for_json(run) for precision, run in runs.items()}
    measuring.write_json(settings.json, values)
    if settings.picture:
        plot(settings.picture, runs)
    print("\n".join(faults) or f"{steps} steps: all within {settings.bound:.0%} of fp32")
    return 1 if faults else 0


if __name__ == "__main__":
    command(main)()
