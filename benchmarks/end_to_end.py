"""What a whole training step costs beyond forward, backward and optimiser, on real files.

    python benchmarks/end_to_end.py FOLDER [--steps 40] [--cache ram|disk|none] [model flags]

The training loop as scripts/image_train.py runs it (reading, timesteps, noise, losses, logging), in
turns with forward, backward and optimiser on a batch at hand. Waiting is the time in which the loop
has nothing to compute on because the next batch is not there yet.
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
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.train_util import TrainLoop


@dataclasses.dataclass(frozen=True)
class Settings(measuring.Settings):
    """The benchmark; model flags change the network."""

    batch_size: int = flag(8, "images a step")
    microbatch: int = flag(-1, "images a forward pass; -1: all")
    steps: int = flag(20, "steps to time")
    precision: str = flag("fp32", "fp32, fp16 or bf16")
    cache: str = flag("ram", "none, ram or disk")
    num_workers: int = flag(1, "reading processes")


def main() -> int:
    parser = make_parser(__doc__, Settings, ModelConfig)
    parser.add_argument("folder", help="of images, searched recursively")
    overrides = parse_flags(parser)
    settings = from_flags(Settings, overrides)
    paths = list_images(overrides["folder"])
    channels = 1 if sample_is_grey(paths) else 3
    base = dataclasses.replace(measuring.REFERENCE, in_channels=channels)
    config = from_flags(ModelConfig, overrides, base).with_explicit_channel_mult()
    device = measuring.begin(settings)
    print(f"{len(paths)} images")
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["log", "csv"]):
        values = measure(settings, config, overrides["folder"], device)
    print(
        f"loop's step {values['loop_s']:.4f} s, forward, backward and optimiser"
        f" {values['bare_s']:.4f} s: ratio {values['ratio']:.3f};"
        f" waiting for data {values['waiting']:.2%} of the time"
    )
    measuring.write_json(settings.json, {"device": measuring.describe(device), **values})
    return 0


def measure(settings: Settings, config: ModelConfig, folder: str, device: th.device) -> dict:
    """Median seconds of both kinds of step, their ratio, and the share of waiting."""
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

    def whole() -> float:
        """One step; the seconds of it spent waiting for the batch."""
        began = time.perf_counter()
        batch, cond = next(batches)
        waited = time.perf_counter() - began
        loop.run_step(batch, cond)
        if loop.step % loop.settings.log_interval == 0:
            logger.dumpkvs()
        return waited

    def timed(call) -> tuple[float, float]:
        if device.type == "cuda":
            th.cuda.synchronize(device)
        began = time.perf_counter()
        waited = call()
        if device.type == "cuda":
            th.cuda.synchronize(device)
        return time.perf_counter() - began, waited or 0.0

    bare()
    whole()
    bares, wholes, waits = [], [], []
    for _ in range(settings.steps):
        bares.append(timed(bare)[0])
        seconds, waited = timed(whole)
        wholes.append(seconds)
        waits.append(waited)
    batches.close()
    ratios = [a / b for a, b in zip(wholes, bares)]
    return {
        "loop_s": statistics.median(wholes),
        "bare_s": statistics.median(bares),
        "ratio": statistics.median(ratios),
        "waiting": sum(waits) / sum(wholes),
        "steps": settings.steps,
    }


if __name__ == "__main__":
    command(main)()
