"""How fast images are drawn: images per second by sampler and number of steps.

    python benchmarks/sampling.py [--samplers ddpm:250,ddim:50,dpm++2m:20] [model flags]

The network has random weights: the time does not depend on them. The share is that of the network's
counted operations in the machine's rate of matrix multiplication; what is missing to that of
benchmarks/inference.py is what the sampler itself costs.
"""

import dataclasses

import torch as th
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

from guided_diffusion.networks.compiled import compiled
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.sampling.images import sample_images


def network_calls(sampler: str, steps: int) -> int:
    """Heun's method looks twice at every step but the last."""
    return 2 * steps - 1 if sampler == "heun" else steps


@dataclasses.dataclass(frozen=True)
class Settings(TimedSettings):
    """The benchmark; model flags change the network."""

    rounds: int = flag(3, "timings of each case; medians count")
    samplers: str = flag("ddim:10,dpm++2m:10,heun:5", "SAMPLER:STEPS, by commas")
    batch_size: int = flag(4, "images at once")
    compile: bool = flag(False, "compile the network")


def main() -> int:
    overrides = parse_flags(make_parser(__doc__, Settings, ModelConfig))
    settings = from_flags(Settings, overrides)
    config = from_flags(ModelConfig, overrides, REFERENCE).with_explicit_channel_mult()
    device = begin(settings)
    model = config.build().to(device).eval()
    diffusion = DiffusionConfig(learn_sigma=config.learn_sigma).build()
    shape = (config.in_channels, config.image_size, config.image_size)
    batch = settings.batch_size
    network = compiled(model) if settings.compile else model
    operations = operations_of(model, th.empty(batch, *shape), th.empty(batch))

    def draw(sampler: str, steps: int, precision: str) -> None:
        with autocast(device, precision):
            sample_images(
                network,
                diffusion,
                shape,
                range(settings.batch_size),
                sampler=sampler,
                steps=steps,
                device=device,
            )

    cases = []
    for precision in usable_precisions(settings.precision, device):
        for text in settings.samplers.split(","):
            sampler, _, steps = text.partition(":")
            if not steps.isdigit():
                raise UserError(f"--samplers {text}: give SAMPLER:STEPS, as in dpm++2m:20")
            cases.append(
                Case(
                    f"{sampler}, {steps} steps",
                    lambda s=sampler, n=int(steps), p=precision: draw(s, n, p),
                    operations * network_calls(sampler, int(steps)),
                    precision,
                    settings.batch_size,
                )
            )
    write_json(settings.json, report(cases, device, settings))
    return 0


if __name__ == "__main__":
    command(main)()
