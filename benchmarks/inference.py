"""How fast radiographs are segmented, as a share of the machine's rate of matrix multiplication.

    python benchmarks/inference.py [--batch_sizes 1,8] [--sizes 64] [--peer NAMES] [model flags]

The network as it was fine-tuned and with its timestep folded into the weights, in turns with peers:
diffusers' U-Net of the same widths, and smp's U-Net (another network: compare shares, not seconds).
"""

import dataclasses
from collections.abc import Callable

import torch as th
import torch.nn as nn
from measuring import (
    REFERENCE,
    Case,
    TimedSettings,
    autocast,
    begin,
    report,
    usable_precisions,
    write_json,
)
from peers import build_peer

from guided_diffusion.networks.compiled import compiled
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags


@dataclasses.dataclass(frozen=True)
class Settings(TimedSettings):
    """The benchmark; model flags change the network."""

    rounds: int = flag(7, "timings of each case; medians count")
    batch_sizes: str = flag("1,8", "images a call, by commas")
    sizes: str = flag("64", "height and width of the images, pixels, by commas")
    classes: int = flag(5, "outputs of the networks")
    peer: str = flag("diffusers,smp", "by commas: diffusers, smp, a checkout, or none")
    compile: bool = flag(False, "compile the networks")


class AtOneTimestep(nn.Module):
    """A peer called with images alone."""

    def __init__(self, network: nn.Module, timed: bool):
        super().__init__()
        self.network, self.timed = network, timed

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.network(x, x.new_ones(len(x))) if self.timed else self.network(x)


def build_networks(settings: Settings, config: ModelConfig) -> dict[str, nn.Module]:
    ours = config.build_segmentation(settings.classes, None, 1)
    networks = {"this network": ours, "this network, folded": ours.folded()}
    for name in settings.peer.split(","):
        if name == "smp":
            try:
                import segmentation_models_pytorch as smp
            except ImportError:
                print("no peer smp: segmentation_models_pytorch is not installed")
                continue
            peer = smp.Unet(
                "resnet34",
                encoder_weights=None,
                in_channels=config.in_channels,
                classes=settings.classes,
            )
        else:
            peer = build_peer(name, config, settings.classes)
        if peer is not None:
            networks[name] = AtOneTimestep(peer, timed=name != "smp")
    return networks


def call(network: Callable, images: th.Tensor, precision: str) -> None:
    with th.inference_mode(), autocast(images.device, precision):
        network(images)


def main() -> int:
    overrides = parse_flags(make_parser(__doc__, Settings, ModelConfig))
    settings = from_flags(Settings, overrides)
    config = from_flags(ModelConfig, overrides, REFERENCE).with_explicit_channel_mult()
    device = begin(settings)
    networks = {k: v.to(device).eval() for k, v in build_networks(settings, config).items()}
    called = {k: compiled(v) for k, v in networks.items()} if settings.compile else networks
    cases = []
    for precision in usable_precisions(settings.precision, device):
        for size in map(int, settings.sizes.split(",")):
            for batch in map(int, settings.batch_sizes.split(",")):
                shape = (batch, config.in_channels, size, size)
                images = th.rand(shape, device=device) * 2 - 1
                cases += [
                    Case(
                        f"{name}, {batch} of {size}",
                        lambda n=called[name], i=images, p=precision: call(n, i, p),
                        operations_of(network, images),
                        precision,
                        batch,
                    )
                    for name, network in networks.items()
                ]
    write_json(settings.json, report(cases, device, settings))
    return 0


if __name__ == "__main__":
    command(main)()
