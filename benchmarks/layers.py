"""The compiled kernels against torch's operations, forward and backward, in both memory layouts.

    python benchmarks/layers.py [--precision fp32,bf16] [--threads 1] [--json FILE]

Times the layers of the benchmarks' network at their sizes, in turns: a convolution, group
normalisation with SiLU, and attention, through the kernels and with GUIDED_DIFFUSION_KERNELS=off.
"""

import dataclasses
import statistics
from collections.abc import Callable

import measuring
import torch as th

from guided_diffusion.kernels import library
from guided_diffusion.nn import conv_nd, normalization
from guided_diffusion.runtime.command_line.flags import flag, from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.unet import QKVAttentionLegacy

CONVOLUTIONS = ((64, 64), (128, 32), (192, 16), (256, 8))  # channels, side
NORMS = ((64, 64), (128, 32), (256, 8))
ATTENTION = ((4, 1024, 32), (6, 256, 32), (8, 64, 32), (4, 1024, 64))  # heads, positions, channels


@dataclasses.dataclass(frozen=True)
class Settings(measuring.Settings):
    """Benchmark settings."""

    precision: str = flag(
        "fp32,bf16", "comma-separated; those slower than fp32 here are skipped", basic=True
    )
    batch_size: int = flag(8, "images", least=1, basic=True)
    rounds: int = flag(9, "timings per case; the median is reported", least=1, basic=True)


def call(layer: Callable[..., th.Tensor], x: th.Tensor, precision: str) -> Callable[[], None]:
    """A forward and backward pass of a layer in a precision."""
    x = x.to(measuring.PRECISIONS[precision]).requires_grad_()
    with measuring.autocast(x.device, precision):
        grad = th.randn_like(layer(x))

    def run() -> None:
        with measuring.autocast(x.device, precision):
            y = layer(x)
        y.backward(grad)
        x.grad = None

    return run


def cases(precision: str, batch: int) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """By name, the calls on contiguous maps and on maps with channels last."""

    def in_both_layouts(layer, x: th.Tensor):
        last = x.contiguous(memory_format=th.channels_last)
        return call(layer, x, precision), call(layer, last, precision)

    found = {}
    for channels, side in CONVOLUTIONS:
        layer = conv_nd(2, channels, channels, 3, padding=1)
        x = th.randn(batch, channels, side, side)
        found[f"3x3 convolution, {channels} channels, {side}x{side}"] = in_both_layouts(layer, x)
    for channels, side in NORMS:
        layer = normalization(channels).silu
        x = th.randn(batch, channels, side, side)
        found[f"norm and SiLU, {channels} channels, {side}x{side}"] = in_both_layouts(layer, x)
    for heads, positions, channels in ATTENTION:
        layer = QKVAttentionLegacy(heads)
        x = th.randn(batch, 3 * heads * channels, positions)
        last = th.randn(batch, positions, 3 * heads * channels).transpose(1, 2)
        name = f"attention, {heads} heads of {channels}, {positions} positions"
        found[name] = call(layer, x, precision), call(layer, last, precision)
    return found


def without_kernels(run: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        available = library.library
        library.library = lambda: None
        try:
            run()
        finally:
            library.library = available

    return call


def main() -> int:
    settings = from_flags(Settings, parse_flags(make_parser(__doc__, Settings)))
    device = measuring.set_up_device(dataclasses.replace(settings, device="cpu"))
    if library.library() is None:
        raise UserError(
            "the kernels are not there: they need a processor with AVX-512, and a C compiler when"
            " the package is installed"
        )
    print(library.describe())
    head = (
        f"{'forward and backward, ms':52} {'kernels':>8} {'torch':>8} {'torch, channels last':>21}"
    )
    lines = []
    for precision in measuring.usable_precisions(settings.precision, device):
        print(f"{precision}\n{head}")
        for name, (contiguous, last) in cases(precision, settings.batch_size).items():
            runs = (last, without_kernels(contiguous), without_kernels(last))
            times = [[] for _ in runs]
            for run in runs:
                run()
            for _ in range(settings.rounds):
                for run, seconds in zip(runs, times):
                    seconds.append(measuring.elapsed(run, device))
            ours, *theirs = (1000 * statistics.median(seconds) for seconds in times)
            print(f"{name:52} {ours:8.2f} {theirs[0]:8.2f} {theirs[1]:21.2f}")
            values = {"kernels": ours, "torch": theirs[0], "torch_channels_last": theirs[1]}
            lines.append({"name": name, "precision": precision, **values})
    measuring.write_json(settings.json, {"device": measuring.describe(device), "lines": lines})
    return 0


if __name__ == "__main__":
    command(main)()
