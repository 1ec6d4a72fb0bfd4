"""A tiny training loop, for the tests of what it does."""

import copy
import csv
import dataclasses
import itertools

import numpy as np
import torch as th

from guided_diffusion import logger
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.runtime.storage.resume import Start
from guided_diffusion.train_util import TrainLoop, find_start

TINY = ModelConfig(
    image_size=8,
    in_channels=1,
    num_channels=16,
    num_res_blocks=1,
    channel_mult="1",
    attention_resolutions="8",
    num_head_channels=8,
    learn_sigma=True,
)
# 64 channels are two in a group of the normalisation: with one, a bias before it has no effect and
# a gradient of rounding errors alone, which AdamW blows up to full steps.
WIDE = dataclasses.replace(TINY, num_channels=64)
DIFFUSION = DiffusionConfig(learn_sigma=True, diffusion_steps=20, noise_schedule="cosine")


def batches(first: int = 0, size: int = 4, **extra):
    """Batches from step `first` on, each a function of its step."""
    for step in itertools.count(first):
        images = np.random.default_rng(step).uniform(-1, 1, (size, 1, 8, 8))
        yield th.from_numpy(images).float(), {k: v(step, size) for k, v in extra.items()}


def new_loop(
    config: ModelConfig = TINY, size: int = 4, loop_type: type[TrainLoop] | None = None, **options
) -> TrainLoop:
    th.manual_seed(1)
    defaults = {
        "model": config.build(),
        "diffusion": DIFFUSION.build(),
        "data": lambda first: batches(first, size),
        "batch_size": size,
        "microbatch": -1,
        "lr": 1e-3,
        "ema_rate": "0.5,0.9",
        "log_interval": 1,
        "save_interval": 1000,
        "start": Start(),
        "max_grad_norm": 1.0,
    }
    return (loop_type or TrainLoop)(**{**defaults, **options})


def weights(loop: TrainLoop) -> dict[str, th.Tensor]:
    return copy.deepcopy(loop.model.state_dict())


def furthest(these: dict, those: dict) -> float:
    assert list(these) == list(those)
    return max(float((these[k] - those[k]).abs().max()) for k in these)


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def logged_losses(folder) -> list[dict[str, str]]:
    """The rows without what depends on the clock."""
    clock = ("seconds_per_step", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(folder)]


def run_in(path, *ends: int, more=dict, **options) -> TrainLoop:
    """A run that is stopped at the steps `ends` and resumed by rerunning the same command.

    :param more: gives further options, anew for each start.
    """
    for end in ends:
        start = find_start(str(path))
        logger.configure(str(path), ["csv"], resume_step=start.step)
        loop = new_loop(start=start, max_steps=end, **options, **more())
        loop.run_loop()
        logger.reset()
    return loop


def files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".csv"))


def interrupted(at: int):
    """Data that end with Ctrl-C before step `at` + 1."""

    def data(first):
        for step, batch in enumerate(batches(first), first):
            if step == at:
                raise KeyboardInterrupt
            yield batch

    return data
