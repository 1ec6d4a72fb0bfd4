"""What every kind of segmentation network defines, and what the kinds share.

A kind is one module, listed in `model_file.KINDS`, which defines:

- `build(config)`: the network with random weights;
- `members(model, device, options)`: what prediction averages the class probabilities of, which is
  the network itself, the network at several timesteps, or its draws;
- `ExportCore(model)`, if it can be exported to ONNX: the network as a module without padding, for
  images whose sides its attribute `multiple` divides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch as th

from guided_diffusion.networks.compiled import compiled
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.model_file import SegmentationConfig

# [N x in_channels x H x W] in [-1, 1], of any size, to logits [N x classes x H x W]
Network = Callable[..., th.Tensor]


class Member(NamedTuple):
    """A network, and how much it counts in the mean beside other members: its weight, for each
    radiograph times its certainty if `by_certainty` is set."""

    network: Network
    weight: float = 1.0
    by_certainty: bool = False


@dataclass(frozen=True)
class MemberOptions:
    """How a network is to be used for prediction; unset fields leave the network's own values.

    timesteps: at which radiographs enter, for kind "unet": diffusion steps for a `Predictor`, in
    the network's units for a kind's `members`. num_samples, steps, sampler, seed: see
    `MaskDiffusionModel`, for kind "mask_diffusion". compile: compile the network, see
    `compiled.compiled`.
    """

    timesteps: tuple[float, ...] = ()
    num_samples: int | None = None
    steps: int | None = None
    sampler: str | None = None
    seed: int | None = None
    compile: bool = False

    def check(self, kind: str, accepted: Sequence[str] = ()) -> None:
        """:raises UserError: if an option is set that networks of this kind do not have."""
        names = [n for n, value in vars(self).items() if n != "compile" and value not in (None, ())]
        if refused := [f"--{name}" for name in names if name not in accepted]:
            raise UserError(f"networks of kind {kind} have no {', '.join(refused)}: leave it out")


def single_member(model: th.nn.Module, device: th.device, options: MemberOptions) -> list[Member]:
    """The network itself as the only member, moved to the device and compiled if wanted."""
    model = model.to(device)
    return [Member(compiled(model) if options.compile else model)]


def architecture(config: SegmentationConfig) -> ModelConfig:
    """The configuration of the diffusion network that a segmentation network is made from.

    :raises UserError: if there is none, as in a damaged model file.
    """
    if config.model is None:
        raise UserError(
            f"a network of kind {config.kind} needs the architecture of a diffusion network"
        )
    return config.model
