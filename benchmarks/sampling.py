"""Sampling throughput: images per second by sampler and number of steps.

    python benchmarks/sampling.py [--samplers ddpm:250,ddim:50,dpm++2m:20] [model flags]

The network has random weights, since the time does not depend on them. The share is that of the
network's operations alone in the machine's peak matrix-product rate: the gap to the share that
benchmarks/inference.py reports is the overhead of the sampler.
"""

import dataclasses

import measuring
import torch as th

from guided_diffusion.networks.compiled import compiled
from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.sampling.images import sample_images


def network_calls(sampler: str, steps: int) -> int:
    """How often a sampler calls the network: Heun's method twice per step except the last."""
    return 2 * steps - 1 if sampler == "heun" else steps


@dataclasses.dataclass(frozen=True)
class Settings(measuring.TimedSettings):
    """Benchmark settings; the model flags define the network to measure."""

    rounds: int = flag(3, "timings per case; the median is reported", basic=True)
    samplers: str = flag("ddim:10,dpm++2m:10,heun:5", "comma-separated SAMPLER:STEPS", basic=True)
    batch_size: int = flag(4, "images per batch", basic=True)
    compile: bool = flag(False, "compile the network", basic=True)


def main() -> int:
    settings, config, _ = measuring.parse_benchmark_flags(__doc__, Settings)
    device = measuring.set_up_device(settings)
    model = config.build().to(device).eval()
    diffusion = DiffusionConfig(learn_sigma=config.learn_sigma).build()
    shape = (config.in_channels, config.image_size, config.image_size)
    batch = settings.batch_size
    network = compiled(model) if settings.compile else model
    operations = operations_of(model, th.empty(batch, *shape), th.empty(batch))

    def draw(sampler: str, steps: int, precision: str) -> None:
        with measuring.autocast(device, precision):
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
    for precision in measuring.usable_precisions(settings.precision, device):
        for text in settings.samplers.split(","):
            sampler, _, steps = text.partition(":")
            if not steps.isdigit():
                raise UserError(f"--samplers {text}: expected SAMPLER:STEPS, such as dpm++2m:20")
            cases.append(
                measuring.Case(
                    f"{sampler}, {steps} steps",
                    lambda s=sampler, n=int(steps), p=precision: draw(s, n, p),
                    operations * network_calls(sampler, int(steps)),
                    precision,
                    settings.batch_size,
                )
            )
    measuring.write_json(settings.json, measuring.run_cases(cases, device, settings))
    return 0


if __name__ == "__main__":
    command(main)()
