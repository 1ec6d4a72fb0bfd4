"""What a long run would take: parameters, memory, seconds a step; nothing is written."""

import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import sample_is_grey
from guided_diffusion.images.files import list_images
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.runtime.flags import from_flags
from guided_diffusion.train_util import Start, TrainLoop
from guided_diffusion.training.run import Run, TrainConfig, with_global_batch

STEPS = 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """parameters: numbers. operations: of a step's forward and backward passes, floating point.
    seconds: a step, median. peak: bytes, of the process on a CPU, of the allocator on CUDA.
    """

    parameters: int
    operations: int
    seconds: float
    peak: int
    images: int

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.parameters / 1e6:.2f} million parameters",
                f"{self.operations / 1e12:.3f} teraFLOP a step of {self.images} images"
                f" ({self.operations / self.seconds / 1e12:.3f} teraFLOP/s)",
                f"{self.peak / 2**30:.2f} GiB of memory at the peak",
                f"{self.seconds:.3f} seconds a step: {3600 / self.seconds:.0f} steps an hour,"
                f" {86400 * self.images / self.seconds:.3g} images a day",
            ]
        )


def dry_run(overrides: Mapping[str, Any], model_type: type = ModelConfig) -> Estimate:
    """Train some steps on random images, with the given flags, into nowhere.

    :param overrides: the given flags; of `data_dir` only a sample is looked at, for the channels.
    :param model_type: the configuration of the network.
    :raises UserError: for flags that make no network.
    """
    overrides = dict(overrides)
    if "in_channels" not in overrides:
        grey = (
            sample_is_grey(list_images(overrides["data_dir"]))
            if overrides.get("data_dir")
            else True
        )
        overrides["in_channels"] = 1 if grey else 3
    model = from_flags(model_type, overrides).with_explicit_channel_mult()
    train = with_global_batch(from_flags(TrainConfig, overrides))
    diffusion = from_flags(DiffusionConfig, overrides)
    reading = ReadingConfig(model.image_size, model.in_channels)
    run = Run("", Start(), model, diffusion, reading, train)
    device = dist_util.dev()
    network = model.build().to(device)
    images = (
        th.rand(train.batch_size, model.in_channels, model.image_size, model.image_size) * 2 - 1
    )
    cond = {"y": th.zeros(len(images), dtype=th.int64)} if model.class_cond else {}
    size = train.microbatch if 0 < train.microbatch < len(images) else len(images)
    part = {name: value[:size] for name, value in cond.items()}
    timesteps = th.zeros(size)
    operations = operations_of(network, images[:size], timesteps, backward=True, **part)
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, []):
        process = diffusion.build()
        loop = TrainLoop(
            model=network,
            diffusion=process,
            data=iter(()),
            schedule_sampler=create_named_schedule_sampler(train.schedule_sampler, process),
            **run.loop_arguments(),
        )
        seconds = []
        for _ in range(1 + STEPS):
            began = time.perf_counter()
            loop.run_step(images, cond)
            if device.type == "cuda":
                th.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    if device.type == "cuda":
        peak = th.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Estimate(
        parameters=sum(p.numel() for p in network.parameters()),
        operations=round(operations * len(images) / size),
        seconds=statistics.median(seconds[1:]),  # the first one allocates, and compiles
        peak=peak,
        images=len(images),
    )
