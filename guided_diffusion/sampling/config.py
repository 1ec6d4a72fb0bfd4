"""Sampling flags, and the sampler, step count and classes that they select."""

import dataclasses
from collections.abc import Sequence

from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import MOST_BATCH, MOST_SEED, flag
from guided_diffusion.sampling.solvers import SAMPLERS, WITH_ETA, checked_sampler

# default step count of the fast samplers
DEFAULT_STEPS = 20
_FEW = [name for name, sampler in SAMPLERS.items() if sampler.few_steps]
_ALL = [name for name in SAMPLERS if name not in _FEW]


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sampling."""

    TITLE = "Sampling"

    model_path: str = flag("", "checkpoint, ema_*.pt or model*.pt; config.json beside it is read")
    num_samples: int = flag(10000, "number of images to sample", least=1, most=10**7)
    batch_size: int = flag(16, "images per batch and rank", least=1, most=MOST_BATCH)
    seed: int = flag(
        0,
        "seed of noise and random classes; image k depends on it and on k",
        least=0,
        most=MOST_SEED,
    )
    sampler: str = flag("", "'': ddpm, or ddim with --use_ddim", choices=("", *SAMPLERS))
    steps: int = flag(
        0,
        f"0: {DEFAULT_STEPS} for {', '.join(_FEW)}; all timesteps for {', '.join(_ALL)}",
        least=0,
        most=10**5,
    )
    eta: float = flag(
        0.0,
        f"noise added by {' and '.join(WITH_ETA)}: 0 none, 1 as much as ddpm, which corrects errors"
        " of the network",
        least=0,
        most=1,
    )
    use_ddim: bool = flag(False, "same as --sampler ddim")
    clip_denoised: bool = flag(True, "clip every predicted image to the range of pixel values")
    class_labels: str = flag(
        "", "class names or numbers, comma-separated, used in turn; '': random classes"
    )
    guidance_scale: float = flag(
        1.0,
        "classifier-free guidance scale; 1 disables it; needs a network trained with"
        " --cond_drop_prob or --use_ablated_segmentations",
        least=-1000,
        most=1000,
    )
    save_process: bool = flag(False, "also show the sampling process: process.png and process.gif")
    compile: bool = flag(
        False, "compile the network, on GPUs to a CUDA graph: takes minutes, then runs faster"
    )
    out_dir: str = flag("", "folder for the results; '': see docs/sampling.md")


def choose_sampler(settings: SampleConfig, diffusion: SpacedDiffusion) -> tuple[str, int]:
    """The sampler's name and the number of steps that the flags select.

    :raises UserError: if the flags contradict each other or the sampler does not support them.
    """
    name = settings.sampler or ("ddim" if settings.use_ddim else "ddpm")
    if settings.use_ddim and name != "ddim":
        raise UserError(f"--use_ddim True contradicts --sampler {name}: give only one of them")
    total = diffusion.num_timesteps
    steps = settings.steps or (min(DEFAULT_STEPS, total) if name in _FEW else total)
    checked_sampler(name, diffusion, steps, settings.eta)
    return name, steps


@dataclasses.dataclass(frozen=True)
class Labels:
    """Assigns a class to each image of a class-conditional network.

    names: class names, () if unknown. number: how many classes there are. chosen: labels to cycle
    through; () draws them uniformly at random. seed: seed for drawing them.
    """

    names: tuple[str, ...]
    number: int
    chosen: tuple[int, ...]
    seed: int

    def of(self, indices: Sequence[int]) -> list[int]:
        """Labels of the images with these indices."""
        if self.chosen:
            return [self.chosen[index % len(self.chosen)] for index in indices]
        return (rng.uniforms(self.seed, "class", indices) * self.number).astype(int).tolist()

    def name(self, label: int) -> str:
        return self.names[label] if self.names else str(label)


def parse_labels(text: str, names: Sequence[str], number: int, seed: int) -> Labels:
    """Parse `--class_labels`, a comma-separated list of class names or numbers.

    :param names: class names from config.json, empty if unknown.
    :param number: how many classes the network has, if `names` is empty.
    :raises UserError: if a class does not exist.
    """
    number = len(names) or number
    chosen = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part in names:
            chosen.append(list(names).index(part))
        elif part.isdecimal() and int(part) < number:
            chosen.append(int(part))
        else:
            known = ", ".join(names[:10]) + " or " if names else ""
            raise UserError(f"--class_labels {part}: there are {known}0 to {number - 1}")
    return Labels(tuple(names), number, tuple(chosen), seed)
