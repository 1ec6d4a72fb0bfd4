"""Overhead of the training loop over forward, backward and optimiser, on real files.

    python benchmarks/end_to_end.py FOLDER [--steps 40] [--cache ram|disk|none] [model flags]

Interleaves steps of the training loop as scripts/image_train.py runs it (reading, timesteps, noise,
losses, logging) with bare ones: forward, backward and optimiser on a batch already on the device.
Waiting is the time that the loop blocks on the data loader.
"""

import dataclasses
import statistics
import tempfile
import time

import measuring
import torch as th

from guided_diffusion import logger
from guided_diffusion.image_datasets import load_data, sample_is_grey
from guided_diffusion.images.files import list_images
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.runtime.command_line.flags import flag, from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import command
from guided_diffusion.train_util import TrainLoop


@dataclasses.dataclass(frozen=True)
class Settings(measuring.Settings):
    """Benchmark settings; the model flags define the network to measure."""

    batch_size: int = flag(8, "images per step", basic=True)
    microbatch: int = flag(-1, "images per forward pass; -1: the whole batch", basic=True)
    steps: int = flag(20, "steps to time", basic=True)
    precision: str = flag("fp32", "fp32, fp16 or bf16", basic=True)
    cache: str = flag("ram", "none, ram or disk", basic=True)
    num_workers: int = flag(1, "data loader processes", basic=True)


def main() -> int:
    parser = make_parser(__doc__, Settings, ModelConfig)
    parser.add_argument("folder", help="folder of images, searched recursively")
    overrides = parse_flags(parser)
    settings = from_flags(Settings, overrides)
    paths = list_images(overrides["folder"])
    channels = 1 if sample_is_grey(paths) else 3
    base = dataclasses.replace(measuring.REFERENCE, in_channels=channels)
    config = measuring.model_config(overrides, base)
    device = measuring.set_up_device(settings)
    print(f"{len(paths)} images")
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["log", "csv"]):
        values = measure(settings, config, overrides["folder"], device)
    print(
        f"training loop {values['loop_s']:.4f} s per step; forward, backward and optimiser"
        f" {values['bare_s']:.4f} s; ratio {values['ratio']:.3f};"
        f" waiting for data {values['waiting']:.2%} of the time"
    )
    measuring.write_json(settings.json, {"device": measuring.describe(device), **values})
    return 0


def measure(settings: Settings, config: ModelConfig, folder: str, device: th.device) -> dict:
    """Median seconds of both kinds of step, median ratio, and share of time spent waiting."""
    batches = load_data(
        data_dir=folder,
        batch_size=settings.batch_size,
        image_size=config.image_size,
        random_flip=False,
        reading=ReadingConfig(config.image_size, config.in_channels),
        cache=settings.cache,
        num_workers=settings.num_workers,
    )
    loop = TrainLoop(
        model=config.build().to(device),
        diffusion=DiffusionConfig(learn_sigma=config.learn_sigma).build(),
        data=batches,
        batch_size=settings.batch_size,
        microbatch=settings.microbatch,
        lr=1e-6,
        ema_rate=0.9999,
        log_interval=10,
        save_interval=10**9,
        resume_checkpoint="none",
        precision=settings.precision,
        max_grad_norm=1.0,
    )
    images = next(batches)[0].to(device)
    timesteps = th.randint(0, 1000, (len(images),), device=device)

    def bare() -> None:
        stepper, size = loop.stepper, loop.microbatch
        for first in range(0, len(images), size):
            rows = slice(first, first + size)
            with stepper.autocast():
                output = stepper.model(images[rows], timesteps[rows])
            stepper.backward(output.float().square().mean() * len(images[rows]) / len(images))
        stepper.step()

    waits = []

    def full() -> None:
        start = time.perf_counter()
        batch, cond = next(batches)
        waits.append(time.perf_counter() - start)
        loop.run_step(batch, cond)
        if loop.step % loop.settings.log_interval == 0:
            logger.dumpkvs()

    bare()
    full()
    waits.clear()  # those of the warm-up
    bare_times, full_times = [], []
    for _ in range(settings.steps):
        bare_times.append(measuring.elapsed(bare, device))
        full_times.append(measuring.elapsed(full, device))
    batches.close()
    return {
        "loop_s": statistics.median(full_times),
        "bare_s": statistics.median(bare_times),
        "ratio": statistics.median(a / b for a, b in zip(full_times, bare_times)),
        "waiting": sum(waits) / sum(full_times),
        "steps": settings.steps,
    }


if __name__ == "__main__":
    command(main)()
