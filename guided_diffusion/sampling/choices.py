"""The sampler, step count and classes that the flags of sampling select."""

import dataclasses
from collections.abc import Sequence

from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.config import DEFAULT_STEPS, TRAITS, SampleConfig
from guided_diffusion.sampling.solvers import checked_sampler


def choose_sampler(settings: SampleConfig, diffusion: SpacedDiffusion) -> tuple[str, int]:
    """The sampler's name and the number of steps that the flags select.

    :raises UserError: if the flags contradict each other or the sampler does not support them.
    """
    name = settings.sampler or ("ddim" if settings.use_ddim else "ddpm")
    if settings.use_ddim and name != "ddim":
        raise UserError(f"--use_ddim True contradicts --sampler {name}: give only one of them")
    total = diffusion.num_timesteps
    steps = settings.steps or (min(DEFAULT_STEPS, total) if TRAITS[name].few_steps else total)
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
