"""Segmentation throughput, also as a share of the machine's peak matrix-product rate.

    python benchmarks/inference.py [--batch_sizes 1,8] [--sizes 64] [--peer NAMES] [model flags]

Interleaves the network as fine-tuned, the same network with its timestep folded into the weights,
and peers: diffusers' U-Net of the same widths and smp's U-Net (another architecture, so compare
shares, not seconds), each as it is and with channels last.
"""

import copy
import dataclasses
from collections.abc import Callable

import measuring
import torch as th
import torch.nn as nn
from peers import build_peer, in_both_layouts

from guided_diffusion.networks.compiled import compiled
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.networks.precision import store_weights
from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.errors import command


@dataclasses.dataclass(frozen=True)
class Settings(measuring.TimedSettings):
    """Benchmark settings; the model flags define the network to measure."""

    rounds: int = flag(7, "timings per case; the median is reported", basic=True)
    batch_sizes: str = flag("1,8", "images per call, comma-separated", basic=True)
    sizes: str = flag("64", "image sides in pixels, comma-separated", basic=True)
    classes: int = flag(5, "output channels of the networks", basic=True)
    peer: str = flag(
        "diffusers,smp", "comma-separated: diffusers, smp, path of a checkout, none", basic=True
    )
    compile: bool = flag(False, "compile the networks", basic=True)


class ImagesOnly(nn.Module):
    """A peer that is called with images alone, at timestep 1 if it takes a timestep."""

    def __init__(self, network: nn.Module, takes_timestep: bool):
        super().__init__()
        self.network, self.takes_timestep = network, takes_timestep

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.network(x, x.new_ones(len(x))) if self.takes_timestep else self.network(x)


def build_networks(settings: Settings, config: ModelConfig) -> dict[str, nn.Module]:
    """The network, the same with its timestep folded, and the peers that are installed."""
    ours = config.build_segmentation(settings.classes, None, 1)
    networks = {"this network": ours, "this network, folded": ours.folded()}
    for name in settings.peer.split(","):
        if name == "smp":
            try:
                import segmentation_models_pytorch as smp
            except ImportError:
                print("peer smp skipped: segmentation_models_pytorch is not installed")
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
            networks |= in_both_layouts(name, ImagesOnly(peer, takes_timestep=name != "smp"))
    return networks


def as_predicted(network: nn.Module, precision: str, device: th.device) -> nn.Module:
    """The network as scripts/predict.py prepares it."""
    twin = copy.deepcopy(network)
    store_weights(twin, precision, device)
    return twin


def segment(network: Callable, images: th.Tensor, precision: str) -> None:
    with th.inference_mode(), measuring.autocast(images.device, precision):
        network(images)


def main() -> int:
    settings, config, _ = measuring.parse_benchmark_flags(__doc__, Settings)
    device = measuring.set_up_device(settings)
    networks = {k: v.to(device).eval() for k, v in build_networks(settings, config).items()}
    cases = []
    for precision in measuring.usable_precisions(settings.precision, device):
        callables = {k: as_predicted(v, precision, device) for k, v in networks.items()}
        if settings.compile:
            callables = {k: compiled(v) for k, v in callables.items()}
        for size in map(int, settings.sizes.split(",")):
            for batch in map(int, settings.batch_sizes.split(",")):
                shape = (batch, config.in_channels, size, size)
                images = th.rand(shape, device=device) * 2 - 1
                cases += [
                    measuring.Case(
                        f"{name}, {batch} of {size}",
                        lambda n=callables[name], i=images, p=precision: segment(n, i, p),
                        operations_of(network, images),
                        precision,
                        batch,
                    )
                    for name, network in networks.items()
                ]
    measuring.write_json(settings.json, measuring.run_cases(cases, device, settings))
    return 0


if __name__ == "__main__":
    command(main)()
