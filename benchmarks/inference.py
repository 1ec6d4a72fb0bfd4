"""How fast radiographs are segmented, as a share of the machine's rate of matrix multiplication.

    python benchmarks/inference.py [--batch_sizes 1,8] [--sizes 64] [--peer NAMES] [model flags]

The network as it was fine-tuned and with its timestep folded into the weights, in turns with peers:
diffusers' U-Net of the same widths, and smp's U-Net (another network: compare shares, not seconds).
"""

import contextlib
import copy
import dataclasses

import torch as th
import torch.nn as nn
from measuring import (
    PRECISIONS,
    REFERENCE,
    Case,
    alternate,
    choose_device,
    count_operations,
    describe,
    table,
    usable_precisions,
    write_json,
)
from peers import build_peer

from guided_diffusion.errors import command
from guided_diffusion.flags import flag, from_flags, given_flags, make_parser
from guided_diffusion.script_util import ModelConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """The benchmark; model flags change the network."""

    batch_sizes: str = flag("1,8", "images a call, by commas")
    sizes: str = flag("64", "height and width of the images, pixels, by commas")
    classes: int = flag(5, "outputs of the networks")
    precision: str = flag("fp32,bf16", "those that the machine computes no slower than fp32")
    peer: str = flag("diffusers,smp", "by commas: diffusers, smp, a checkout, or none")
    rounds: int = flag(7, "timings of each case; medians count")
    device: str = flag("", "cpu or cuda; '': a GPU if there is one")
    threads: int = flag(0, "of the CPU; 0: torch's choice")
    compile: bool = flag(False, "compile the networks")
    json: str = flag("", "also write the numbers here")


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


def call(network: nn.Module, images: th.Tensor, precision: str) -> None:
    context = contextlib.nullcontext()
    if precision != "fp32":
        context = th.autocast(images.device.type, PRECISIONS[precision])
    with th.inference_mode(), context:
        network(images)


def work(network: nn.Module, shape: tuple[int, ...]) -> int:
    twin = copy.deepcopy(network).to("meta")

    def forward():
        with th.no_grad():
            twin(th.empty(shape))

    return count_operations(forward)


def main() -> int:
    given = given_flags(make_parser(__doc__, Settings, ModelConfig))
    settings = from_flags(Settings, given)
    config = from_flags(ModelConfig, given, REFERENCE).settled()
    device = choose_device(settings.device)
    if settings.threads:
        th.set_num_threads(settings.threads)
    print(describe(device))
    networks = {k: v.to(device).eval() for k, v in build_networks(settings, config).items()}
    if settings.compile:
        for network in networks.values():
            network.compile()
    cases = []
    for precision in usable_precisions(settings.precision, device):
        for size in map(int, settings.sizes.split(",")):
            for batch in map(int, settings.batch_sizes.split(",")):
                shape = (batch, config.in_channels, size, size)
                images = th.rand(shape, device=device) * 2 - 1
                cases += [
                    Case(
                        f"{name}, {batch} of {size}",
                        lambda n=network, i=images, p=precision: call(n, i, p),
                        work(network, shape),
                        precision,
                        batch,
                    )
                    for name, network in networks.items()
                ]
    rates = alternate(cases, device, settings.rounds)
    lines = table(cases, rates)
    write_json(settings.json, {"device": describe(device), "rates": rates, "lines": lines})
    return 0


if __name__ == "__main__":
    command(main)()
