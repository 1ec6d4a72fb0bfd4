"""How fast a training step is, as a share of the machine's rate of matrix multiplication.

    python benchmarks/train_step.py [--precision fp32,bf16] [--peer diffusers] [model flags]

Forward and backward alone, a whole step (clipping, AdamW, averaged weights), and the step of the
training loop (diffusion losses and logging as well), in turns with a peer of the same widths. The
share is counted operations of forward and backward per second over the measured rate.
"""

import dataclasses
import tempfile

import torch as th
from measuring import (
    REFERENCE,
    Case,
    TimedSettings,
    autocast,
    begin,
    peak_memory,
    report,
    report_own_peak,
    usable_precisions,
    write_json,
)
from peers import build_peer

from guided_diffusion import logger
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.stepper import Stepper
from guided_diffusion.train_util import TrainLoop


@dataclasses.dataclass(frozen=True)
class Settings(TimedSettings):
    """The benchmark; model flags change the network."""

    batch_size: int = flag(8, "images a step")
    microbatch: int = flag(-1, "images a forward pass of the training loop; -1: all")
    peer: str = flag("diffusers", "diffusers, a checkout like guided-diffusion, or none")
    compile: bool = flag(False, "compile the networks")
    recompute: str = flag("", "values of use_checkpoint to compare, by commas, such as norms,True")
    memory_of: str = flag("", "internal: run one step of this precision and print the peak")


class Bench:
    """The network, its peer and a batch on the device."""

    def __init__(self, config: ModelConfig, settings: Settings, device: th.device):
        self.config, self.settings, self.device = config, settings, device
        outputs = config.in_channels * (2 if config.learn_sigma else 1)
        shape = (settings.batch_size, config.in_channels, config.image_size, config.image_size)
        self.model = config.build().to(device)
        self.images = th.rand(shape, device=device) * 2 - 1
        self.timesteps = th.randint(0, 1000, (len(self.images),), device=device)
        self.outputs = outputs

    def forward_backward(self, model, precision: str) -> None:
        with autocast(self.device, precision):
            output = model(self.images, self.timesteps)
        output.float().square().mean().backward()
        model.zero_grad()

    def work(self, model) -> int:
        """Operations of forward and backward."""
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
    overrides = parse_flags(make_parser(__doc__, Settings, ModelConfig))
    settings = from_flags(Settings, overrides)
    config = from_flags(ModelConfig, overrides, REFERENCE).with_explicit_channel_mult()
    device = begin(settings)
    bench = Bench(config, settings, device)
    if settings.memory_of:
        stepper = bench.stepper(settings.memory_of)
        for _ in range(2):
            bench.step(stepper)
        report_own_peak()
        return 0
    peer = build_peer(settings.peer, config, bench.outputs)
    if peer is not None:
        peer = peer.to(device)
    networks = {"this network": bench.model} | ({settings.peer: peer} if peer else {})
    works = {name: bench.work(model) for name, model in networks.items()}
    variants = _variants(settings, config)
    for name, variant in variants.items():
        networks[name] = dataclasses.replace(config, **variant).build().to(device)
        works[name] = works["this network"]  # what is computed again is no more work done
    cases = []
    batch = bench.images.cpu()
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["csv"]):
        for precision in usable_precisions(settings.precision, device):
            for name, model in networks.items():
                called = th.compile(model) if settings.compile else model
                cases.append(
                    Case(
                        f"{name}: forward, backward",
                        lambda m=called, p=precision: bench.forward_backward(m, p),
                        works[name],
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
                    Case(name, call, works["this network"], precision, settings.batch_size)
                )
        values = report(cases, device, settings)
    memory = {}
    for name, variant in {"": {}, **variants}.items():
        found = _memory(settings, {**overrides, **variant}, device, {c.precision for c in cases})
        for precision, peak in found.items():
            what = f"{precision}, {name}" if name else precision
            memory[what] = peak
            print(f"peak memory of a whole step in {what}: {peak / 1e9:.2f} GB")
    values |= {"peak_memory": memory, "model": dataclasses.asdict(config)}
    write_json(settings.json, values)
    return 0


def _variants(settings: Settings, config: ModelConfig) -> dict[str, dict[str, str | bool]]:
    """Flags of the networks of --recompute, by name."""
    parser, found = make_parser("", ModelConfig), {}
    for value in filter(None, settings.recompute.split(",")):
        flags = parse_flags(parser, ["--use_checkpoint", value])
        if flags["use_checkpoint"] != config.use_checkpoint:
            found[f"use_checkpoint {value}"] = flags
    return found


def _memory(settings, overrides, device, precisions) -> dict[str, float]:
    """Peak bytes of the whole step: of a process of its own on a CPU, of the allocator on CUDA."""
    found = {}
    skip = ("memory_of", "json", "peer", "precision", "rounds", "recompute", "profile")
    flags = [f"--{k}={v}" for k, v in overrides.items() if k not in skip]
    for precision in sorted(precisions):
        if device.type == "cpu":
            found[precision] = peak_memory([*flags, f"--memory_of={precision}"])
            continue
        config = from_flags(ModelConfig, overrides, REFERENCE).with_explicit_channel_mult()
        th.cuda.empty_cache()
        before = th.cuda.memory_allocated(device)
        bench = Bench(config, settings, device)
        stepper = bench.stepper(precision)
        th.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            bench.step(stepper)
        found[precision] = th.cuda.max_memory_allocated(device) - before
    return found


if __name__ == "__main__":
    command(main)()
