"""The flags of sampling and what they mean: which sampler, how many steps, which classes."""

import dataclasses
from collections.abc import Sequence

from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.sampling.solvers import SAMPLERS

# the samplers that are meant for few steps, and how many they take unless told
_FEW_STEPS = ("dpm++2m", "heun", "unipc")
DEFAULT_STEPS = 20
_TAKE_ETA = ("ddim", "dpm++2m")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sampling."""

    TITLE = "Sampling"

    model_path: str = flag("", "checkpoint, ema_*.pt or model*.pt; config.json beside it is read")
    num_samples: int = flag(10000, "images to sample")
    batch_size: int = flag(16, "images that a rank samples at once")
    seed: int = flag(0, "of the noise and of the drawn classes; image k depends on it and on k")
    sampler: str = flag("", "by default ddpm, or ddim with --use_ddim", choices=("", *SAMPLERS))
    steps: int = flag(
        0, f"0: {DEFAULT_STEPS} for {', '.join(_FEW_STEPS)}, all timesteps for ddpm and ddim"
    )
    eta: float = flag(
        0.0, "noise of ddim and dpm++2m: 0 none, 1 as much as ddpm, which mends a network's errors"
    )
    use_ddim: bool = flag(False, "the same as --sampler ddim")
    clip_denoised: bool = flag(True, "clip every predicted image to the range of pixels")
    class_labels: str = flag("", "names or numbers, by commas, in turn; '': drawn at random")
    guidance_scale: float = flag(
        1.0,
        "lean away from predictions without class or mask; 1: not at all; needs a network trained"
        " with --cond_drop_prob or --use_ablated_segmentations",
    )
    save_process: bool = flag(False, "also show how images arise: process.png and process.gif")
    compile: bool = flag(
        False, "compile the network, on GPUs to a CUDA graph: minutes at the start, then faster"
    )
    out_dir: str = flag("", "folder of the results; '': see docs/sampling.md")


def choose_sampler(settings: SampleConfig, diffusion: SpacedDiffusion) -> tuple[str, int]:
    """Name and number of steps of the sampler that the flags mean.

    :raises UserError: if they contradict each other or ask for what the sampler cannot do.
    """
    name = settings.sampler or ("ddim" if settings.use_ddim else "ddpm")
    if settings.use_ddim and name != "ddim":
        raise UserError(f"--use_ddim True contradicts --sampler {name}: give one of them")
    if settings.eta and name not in _TAKE_ETA:
        raise UserError(
            f"--eta {settings.eta} is for --sampler {' or '.join(_TAKE_ETA)}, not for {name}"
        )
    total = diffusion.num_timesteps
    steps = settings.steps or (min(DEFAULT_STEPS, total) if name in _FEW_STEPS else total)
    if not 1 <= steps <= total:
        raise UserError(f"--steps {steps}: the diffusion has 1 to {total} timesteps to visit")
    return name, steps


@dataclasses.dataclass(frozen=True)
class Labels:
    """The class of every image that a class-conditional network samples.

    names: of the classes, () where unknown. number: how many there are. chosen: the labels to go
    through in turn; () draws them at random. seed: of the draw.
    """

    names: tuple[str, ...]
    number: int
    chosen: tuple[int, ...]
    seed: int

    def of(self, indices: Sequence[int]) -> list[int]:
        """The labels of the images with these numbers."""
        if self.chosen:
            return [self.chosen[index % len(self.chosen)] for index in indices]
        return (rng.uniforms(self.seed, "class", indices) * self.number).astype(int).tolist()

    def name(self, label: int) -> str:
        return self.names[label] if self.names else str(label)


def parse_labels(text: str, names: Sequence[str], number: int, seed: int) -> Labels:
    """`--class_labels` to labels: names of the classes or, where no class is called so, numbers.

    :param names: the names that config.json lists, if any.
    :param number: of classes that the network has.
    :raises UserError: if there is no such class.
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
