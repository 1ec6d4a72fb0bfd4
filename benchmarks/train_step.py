"""Training step time, also as a share of the machine's peak matrix-product rate.

    python benchmarks/train_step.py [--precision fp32,bf16] [--peer diffusers] [model flags]

Interleaves forward and backward alone, a whole step (gradient clipping, AdamW and EMA included), a
step of the training loop (diffusion losses and logging included) and a peer of the same widths, as
it is and with channels last. The share is counted operations of forward and backward per second
over the measured peak rate.
"""

import dataclasses
import tempfile

import measuring
import torch as th
from peers import build_peer, in_both_layouts

from guided_diffusion import logger
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import command
from guided_diffusion.stepper import Stepper
from guided_diffusion.train_util import TrainLoop


@dataclasses.dataclass(frozen=True)
class Settings(measuring.TimedSettings):
    """Benchmark settings; the model flags define the network to measure."""

    batch_size: int = flag(8, "images per step", basic=True)
    microbatch: int = flag(
        -1, "images per forward pass of the training loop; -1: the whole batch", basic=True
    )
    peer: str = flag(
        "diffusers", "diffusers, path of a guided-diffusion checkout, or none", basic=True
    )
    compile: bool = flag(False, "compile the networks", basic=True)
    recompute: str = flag(
        "", "comma-separated values of use_checkpoint to compare: norms,True", basic=True
    )
    memory_of: str = flag(
        "", "internal: run steps in this precision and print the peak memory", basic=True
    )


class StepBench:
    """The network and a batch on the device, with the steps to time."""

    def __init__(self, config: ModelConfig, settings: Settings, device: th.device):
        self.config, self.settings, self.device = config, settings, device
        outputs = config.in_channels * (2 if config.learn_sigma else 1)
        shape = (settings.batch_size, config.in_channels, config.image_size, config.image_size)
        self.model = config.build().to(device)
        self.images = th.rand(shape, device=device) * 2 - 1
        self.timesteps = th.randint(0, 1000, (len(self.images),), device=device)
        self.outputs = outputs

    def forward_backward(self, model, precision: str) -> None:
        with measuring.autocast(self.device, precision):
            output = model(self.images, self.timesteps)
        output.float().square().mean().backward()
        model.zero_grad()

    def operations(self, model) -> int:
        """Floating-point operations of one forward and backward pass."""
        return operations_of(model, self.images, self.timesteps, backward=True)

    def stepper(self, precision: str) -> Stepper:
        return Stepper(
            self.model,
            lr=1e-6,
            weight_decay=0.01,
            precision=precision,
            max_grad_norm=1.0,
            ema_rates=[0.9999],
        )

    def step(self, stepper: Stepper) -> None:
        with stepper.autocast():
            output = stepper.model(self.images, self.timesteps)
        stepper.backward(output.float().square().mean())
        stepper.step()

    def loop(self, precision: str) -> TrainLoop:
        diffusion = DiffusionConfig(learn_sigma=self.config.learn_sigma).build()
        return TrainLoop(
            model=self.model,
            diffusion=diffusion,
            data=iter(()),
            batch_size=len(self.images),
            microbatch=self.settings.microbatch,
            lr=1e-6,
            ema_rate=0.9999,
            log_interval=10,
            save_interval=10**9,
            resume_checkpoint="none",
            precision=precision,
            weight_decay=0.01,
            max_grad_norm=1.0,
        )


def main() -> int:
    settings, config, overrides = measuring.parse_benchmark_flags(__doc__, Settings)
    device = measuring.set_up_device(settings)
    bench = StepBench(config, settings, device)
    if settings.memory_of:
        stepper = bench.stepper(settings.memory_of)
        for _ in range(2):
            bench.step(stepper)
        measuring.print_own_peak()
        return 0
    peer = build_peer(settings.peer, config, bench.outputs)
    networks = {"this network": bench.model}
    if peer is not None:
        networks |= in_both_layouts(settings.peer, peer.to(device))
    operations = {name: bench.operations(model) for name, model in networks.items()}
    variants = _recomputing_variants(settings, config)
    for name, variant in variants.items():
        networks[name] = dataclasses.replace(config, **variant).build().to(device)
        operations[name] = operations["this network"]  # recomputation does not count
    cases = []
    batch = bench.images.cpu()
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["csv"]):
        for precision in measuring.usable_precisions(settings.precision, device):
            for name, model in networks.items():
                callable_ = th.compile(model) if settings.compile else model
                cases.append(
                    measuring.Case(
                        f"{name}: forward, backward",
                        lambda m=callable_, p=precision: bench.forward_backward(m, p),
                        operations[name],
                        precision,
                        settings.batch_size,
                    )
                )
            stepper, loop = bench.stepper(precision), bench.loop(precision)
            for name, call in (
                ("whole step", lambda s=stepper: bench.step(s)),
                ("training loop's step", lambda lp=loop: lp.run_step(batch, {})),
            ):
                cases.append(
                    measuring.Case(
                        name, call, operations["this network"], precision, settings.batch_size
                    )
                )
        values = measuring.run_cases(cases, device, settings)
    memory = {}
    for name, variant in {"": {}, **variants}.items():
        peaks = _peak_memory(
            settings, {**overrides, **variant}, device, {c.precision for c in cases}
        )
        for precision, peak in peaks.items():
            label = f"{precision}, {name}" if name else precision
            memory[label] = peak
            print(f"peak memory of a whole step in {label}: {peak / 1e9:.2f} GB")
    values |= {"peak_memory": memory, "model": dataclasses.asdict(config)}
    measuring.write_json(settings.json, values)
    return 0


def _recomputing_variants(
    settings: Settings, config: ModelConfig
) -> dict[str, dict[str, str | bool]]:
    """By name, the flags of each network of --recompute that differs from `config`."""
    parser, variants = make_parser("", ModelConfig), {}
    for value in filter(None, settings.recompute.split(",")):
        flags = parse_flags(parser, ["--use_checkpoint", value])
        if flags["use_checkpoint"] != config.use_checkpoint:
            variants[f"use_checkpoint {value}"] = flags
    return variants


def _peak_memory(settings, overrides, device, precisions) -> dict[str, float]:
    """Peak bytes of a whole step by precision.

    On a CPU that of a separate process, on CUDA what the allocator reports.
    """
    peaks = {}
    skip = ("memory_of", "json", "peer", "precision", "rounds", "recompute", "profile")
    flags = [f"--{k}={v}" for k, v in overrides.items() if k not in skip]
    for precision in sorted(precisions):
        if device.type == "cpu":
            peaks[precision] = measuring.peak_memory([*flags, f"--memory_of={precision}"])
            continue
        config = measuring.model_config(overrides)
        th.cuda.empty_cache()
        before = th.cuda.memory_allocated(device)
        bench = StepBench(config, settings, device)
        stepper = bench.stepper(precision)
        th.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            bench.step(stepper)
        peaks[precision] = th.cuda.max_memory_allocated(device) - before
    return peaks


if __name__ == "__main__":
    command(main)()
