"""The flags of every command that predicts: what predictions are averaged over, and precision."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from guided_diffusion.runtime.command_line.flags import MOST_SEED, flag
from guided_diffusion.runtime.command_line.precision_flag import precision_flag
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.segmentation.inference.config import TTA

if TYPE_CHECKING:
    import torch as th

    from guided_diffusion.segmentation.inference.predictor import Segmenter


@dataclass(frozen=True)
class AveragingConfig:
    """How a network is run, and what its predictions are averaged over."""

    TITLE = "Averaging several predictions"

    timesteps: str = flag(
        "", "diffusion steps to average over, such as 1,50,150; '': the model's own (kind unet)"
    )
    tta: str = flag(
        "none",
        "test-time augmentation: views to average over; flips mirror",
        choices=TTA,
        basic=True,
    )
    flip_swap: str | None = flag(
        None,
        "classes that change places when mirrored, such as 1:2, or none; absent: as in training",
        type=str,
    )
    num_samples: int = flag(
        0, "masks to draw; 0: the model's own number (kind mask_diffusion)", least=0, most=10**4
    )
    steps: int = flag(
        0, "denoising steps; 0: the model's own number (kind mask_diffusion)", least=0, most=10**5
    )
    sampler: str = flag("", "sampler; '': the model's own (kind mask_diffusion)")
    seed: int | None = flag(
        None,
        "seed of the draws; absent: the model's own (kind mask_diffusion)",
        type=int,
        least=0,
        most=MOST_SEED,
    )
    precision: str = precision_flag()
    compile: bool = flag(
        False, "compile the network, on GPUs to a CUDA graph: a slow start, then faster"
    )

    def on(self, device: "th.device | str") -> "AveragingConfig":
        """With the precision that suits a device; prints why.

        :raises UserError: for fp16 on a CPU.
        """
        from guided_diffusion.networks.precision import choose_for

        precision, note = choose_for(device, self.precision)
        if note:
            say(note)
        return replace(self, precision=precision)

    def load(self, model: str, device: "th.device | str | None" = None) -> "Segmenter":
        """The predictor of a model file, or of several separated by commas, with these options."""
        from guided_diffusion import dist_util
        from guided_diffusion.networks.precision import choose_for
        from guided_diffusion.segmentation.inference.predictor import load_predictor
        from guided_diffusion.segmentation.networks.kind import MemberOptions

        options = MemberOptions(
            timesteps=parse_timesteps(self.timesteps),
            num_samples=self.num_samples or None,
            steps=self.steps or None,
            sampler=self.sampler or None,
            seed=self.seed,
            compile=self.compile,
        )
        device = device or dist_util.dev()
        precision, _ = choose_for(device, self.precision)
        return load_predictor(model, device, options, self.tta, self.flip_swap, precision)


def parse_timesteps(text: str) -> tuple[float, ...]:
    """`"1,50,150"` to numbers."""
    try:
        timesteps = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        timesteps = (-1.0,)
    if not all(0 <= timestep < float("inf") for timestep in timesteps):
        raise UserError(f"--timesteps {text}: expected numbers from 0 on, such as 1,50,150")
    return timesteps
