"""What a long run would take: parameters, memory, seconds per step; nothing is written."""

import dataclasses
import resource
import statistics
import tempfile
import time

import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.images.files import list_radiographs
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.runtime.flags import Overrides, from_flags
from guided_diffusion.runtime.resume import Start
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.run import (
    infer_channels,
    precision_of,
    with_global_batch,
)

# timed steps, after one that allocates and compiles
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes.

    parameters: of the network. operations: floating-point operations of the forward and backward
    pass. seconds: median. peak: memory in bytes, of the process on a CPU, of the allocator on
    CUDA. images: per step.
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
                f"{self.operations / 1e12:.3f} teraFLOP per step of {self.images} images"
                f" ({self.operations / self.seconds / 1e12:.3f} teraFLOP/s)",
                f"{self.peak / 2**30:.2f} GiB of memory at the peak",
                f"{self.seconds:.3f} seconds per step: {3600 / self.seconds:.0f} steps per hour,"
                f" {86400 * self.images / self.seconds:.3g} images per day",
            ]
        )


def dry_run(overrides: Overrides, model_type: type[ModelConfig] = ModelConfig) -> Estimate:
    """Train some steps on random images, without writing anything.

    :param overrides: the flags on the command line; without `in_channels` a sample of the images
        in `data_dir`, if any, decides on the channels.
    :param model_type: the configuration of the network.
    :raises UserError: for flags that make no network.
    """
    if "in_channels" not in overrides:
        data_dir = overrides.get("data_dir")
        channels = infer_channels(list_radiographs(data_dir)[0]) if data_dir else 1
        overrides = {**overrides, "in_channels": channels}
    model = from_flags(model_type, overrides)
    train = with_global_batch(from_flags(TrainConfig, overrides))
    process = from_flags(DiffusionConfig, overrides).build()
    device = dist_util.dev()
    network = model.build().to(device)
    shape = (train.batch_size, model.in_channels, model.image_size, model.image_size)
    images = th.rand(shape) * 2 - 1
    cond = {"y": th.zeros(len(images), dtype=th.int64)} if model.class_cond else {}
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["stdout"]):
        loop = TrainLoop(
            model=network,
            diffusion=process,
            data=iter(()),
            settings=train,
            folder=folder,
            start=Start(),
            schedule_sampler=create_named_schedule_sampler(train.schedule_sampler, process),
            precision=precision_of(train.precision, model.use_fp16),
        )
        size = min(loop.microbatch, len(images))
        part = {name: value[:size] for name, value in cond.items()}
        operations = operations_of(network, images[:size], th.zeros(size), backward=True, **part)
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
        seconds=statistics.median(seconds[1:]),
        peak=peak,
        images=len(images),
    )
