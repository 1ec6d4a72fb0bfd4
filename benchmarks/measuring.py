"""Shared by the benchmarks: settings, peak matrix-product rate, interleaved timing and tables."""

import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch as th

from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.command_line.flags import flag, from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.memory import keep_freed_memory
from guided_diffusion.runtime.storage.files import save_json

REFERENCE = ModelConfig(
    image_size=64,
    num_channels=64,
    num_res_blocks=2,
    num_head_channels=32,
    attention_resolutions="32,16,8",
    channel_mult="1,2,3,4",
    resblock_updown=True,
)
PRECISIONS = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}
PRODUCT_SIDE = {"cpu": 1536, "cuda": 8192}  # of matrices large enough to reach the peak rate


@dataclass
class Case:
    """A call to time.

    :param operations: floating-point operations per call.
    :param images: images per call.
    :param seconds: the timings, filled in by `time_interleaved`.
    """

    name: str
    call: Callable[[], Any]
    operations: float
    precision: str = "fp32"
    images: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Settings:
    """Benchmark settings; the model flags define the network to measure."""

    TITLE = "Benchmark; flags of the network change the network measured"

    device: str = flag("", "cpu or cuda; '': a GPU if there is one", basic=True)
    threads: int = flag(0, "CPU threads; 0: torch's default", basic=True)
    json: str = flag("", "also write the results to this JSON file", basic=True)


@dataclass(frozen=True)
class TimedSettings(Settings):
    """Benchmark settings; the model flags define the network to measure."""

    precision: str = flag(
        "fp32,bf16", "comma-separated; those slower than fp32 here are skipped", basic=True
    )
    rounds: int = flag(5, "timings per case; the median is reported", basic=True)
    profile: int = flag(
        0, "also print this many of the slowest operations (GPU: kernels) per case", basic=True
    )


SettingsT = TypeVar("SettingsT", bound=Settings)


def parse_benchmark_flags(
    description: str | None, kind: type[SettingsT]
) -> tuple[SettingsT, ModelConfig, dict[str, Any]]:
    """Parse the command line of a benchmark.

    :return: its settings, the network's configuration (by default REFERENCE) and the flags given.
    """
    overrides = parse_flags(make_parser(description, kind, ModelConfig))
    return from_flags(kind, overrides), model_config(overrides), overrides


def model_config(overrides: dict[str, Any], base: ModelConfig = REFERENCE) -> ModelConfig:
    """The configuration of the network to measure: `base` changed by the flags given.

    Without --use_fp16, which flags/unet.sh sets: a benchmark's precisions are autocast's.
    """
    overrides = {**overrides, "use_fp16": False}
    return from_flags(ModelConfig, overrides, base).with_explicit_channel_mult()


def set_up_device(settings: Settings) -> th.device:
    """Select the device; set threads and memory allocation as the project's commands do."""
    if settings.threads:
        th.set_num_threads(settings.threads)
    keep_freed_memory()
    device = resolve_device(settings.device)
    print(describe(device))
    return device


def resolve_device(name: str) -> th.device:
    """The device called `name`; for "" a GPU if there is one, else the CPU.

    :raises UserError: if this machine has no such device.
    """
    if name not in ("", "cpu") and not re.fullmatch(r"cuda(:\d+)?", name):
        raise UserError(f"--device {name}: choose cpu, cuda, or one GPU such as cuda:1")
    gpus = th.cuda.device_count() if th.cuda.is_available() else 0
    if name.startswith("cuda") and int(name[5:] or 0) >= gpus:
        raise UserError(
            f"--device {name}: torch finds {gpus} GPUs; omit --device to run on"
            f" {'a GPU' if gpus else 'the CPU'}"
        )
    if not (name or gpus):
        print("no GPU found: measuring the CPU")
    return th.device(name or ("cuda" if gpus else "cpu"))


def autocast(device: th.device, precision: str) -> contextlib.AbstractContextManager:
    """Context manager that runs a network in this precision."""
    return th.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def describe(device: th.device) -> str:
    """The device, its threads or GPU model, and torch's version."""
    if device.type == "cuda":
        name = th.cuda.get_device_name(device)
    else:
        name = f"{th.get_num_threads()} threads, {th.backends.cpu.get_cpu_capability()}"
    return f"{device.type} ({name}), torch {th.__version__}"


def elapsed(call: Callable[[], Any], device: th.device) -> float:
    """Seconds that a call takes, including all the work it queues on a GPU."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: th.device) -> None:
    if device.type == "cuda":
        th.cuda.synchronize(device)


def matrix_product(precision: str, device: th.device) -> Case:
    """A matrix product large enough to reach the machine's peak rate.

    In fp32 on CUDA it is computed in TF32 where convolutions are, as they are by default: otherwise
    they would seem to exceed the peak.
    """
    side = PRODUCT_SIDE[device.type]
    left, right = (th.randn(side, side, device=device).to(PRECISIONS[precision]) for _ in range(2))

    def in_tf32() -> None:
        before = th.get_float32_matmul_precision()
        th.set_float32_matmul_precision("high")
        left @ right
        th.set_float32_matmul_precision(before)

    def plain() -> None:
        left @ right

    tf32 = device.type == "cuda" and precision == "fp32" and th.backends.cudnn.allow_tf32
    return Case(f"product {precision}", in_tf32 if tf32 else plain, 2 * side**3, precision)


def time_interleaved(cases: Sequence[Case], device: th.device, rounds: int) -> dict[str, float]:
    """Time the cases in turn, each next to a matrix product; fills in their `seconds`.

    :return: the machine's median rate in each precision, in operations per second.
    """
    products = {c.precision: matrix_product(c.precision, device) for c in cases}
    for case in [*products.values(), *cases]:
        case.call()  # warm-up
    for _ in range(rounds):
        for case in cases:
            for timed in (products[case.precision], case):
                timed.seconds.append(elapsed(timed.call, device))
    return {name: product.operations / product.median for name, product in products.items()}


def usable_precisions(wanted: str, device: th.device) -> list[str]:
    """Those of the comma-separated precisions that are no slower than float32 on this machine."""
    usable = []
    reference = matrix_product("fp32", device)
    for name in wanted.split(","):
        if name not in PRECISIONS:
            raise UserError(f"--precision {name}: choose from {', '.join(PRECISIONS)}")
        if name != "fp32":
            if device.type == "cpu" and name == "fp16":
                print("fp16 skipped: it needs CUDA")
                continue
            other = matrix_product(name, device)
            for case in (reference, other):
                case.call()
                case.seconds = [elapsed(case.call, device) for _ in range(3)]
            if other.median > reference.median:
                ratio = reference.median / other.median
                print(f"{name} skipped: matrix products run at {ratio:.2f} of the float32 rate")
                continue
        usable.append(name)
    return usable


def peak_memory(arguments: Sequence[str]) -> float:
    """Peak memory in bytes of this script, run with `arguments` in a process of its own."""
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def own_peak() -> int:
    """This process's peak memory in bytes."""
    with open("/proc/self/status") as file:  # getrusage would include the parent's peak
        peak = next(line for line in file if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def print_own_peak() -> None:
    """Print this process's peak memory in bytes, for `peak_memory` to read."""
    print(own_peak())


def print_table(cases: Sequence[Case], rates: dict[str, float]) -> list[dict[str, Any]]:
    """Print one line per case; returns the same figures as plain values."""
    for precision, rate in rates.items():
        print(f"matrix product {precision}: {rate / 1e9:.0f} GFLOP/s")
    width = max(len(case.name) for case in cases)
    head = f"{'case':{width}} {'precision':9} {'s (median)':>10} {'images/s':>9}"
    print(f"{head} {'GFLOP':>8} {'of peak':>8}")
    lines = []
    for case in cases:
        share = case.operations / case.median / rates[case.precision]
        print(
            f"{case.name:{width}} {case.precision:9} {case.median:10.4f} "
            f"{case.images / case.median:9.2f} {case.operations / 1e9:8.1f} {share:8.1%}"
        )
        lines.append(
            {
                "case": case.name,
                "precision": case.precision,
                "seconds": case.median,
                "images_per_second": case.images / case.median,
                "operations": case.operations,
                "share_of_matrix_rate": share,
            }
        )
    return lines


def run_cases(cases: Sequence[Case], device: th.device, settings: TimedSettings) -> dict[str, Any]:
    """Time the cases, print table and profiles, and return the figures as plain values."""
    rates = time_interleaved(cases, device, settings.rounds)
    values = {"device": describe(device), "rates": rates, "lines": print_table(cases, rates)}
    if settings.profile:
        values["profiles"] = {
            f"{case.name} {case.precision}": print_profile(case, device, settings.profile)
            for case in cases
        }
    return values


def print_profile(case: Case, device: th.device, number: int) -> list[dict[str, Any]]:
    """Print the slowest operations of a call; returns the same figures as plain values.

    :param number: how many operations (CPU, time in children excluded) or kernels (CUDA) to print.
    """
    activity = getattr(th.profiler.ProfilerActivity, device.type.upper())
    with th.profiler.profile(activities=[activity]) as profiler:
        elapsed(case.call, device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [
        (getattr(e, attribute), e.count, e.key)
        for e in profiler.key_averages()
        # nothing that contains kernels, which would count twice: launches, annotated spans
        if e.device_type.name == device.type.upper() and not getattr(e, "is_user_annotation", False)
    ]
    total = sum(microseconds for microseconds, *_ in found)
    if not total:
        raise UserError(f"--profile {number}: torch's profiler recorded nothing on {device}")
    print(f"{case.name} {case.precision}: {total / 1e6:.4f} s")
    lines = []
    for microseconds, calls, name in sorted(found, reverse=True)[:number]:
        print(f"  {microseconds / total:6.1%} {calls:6} calls  {name[:100]}")
        lines.append({"name": name, "seconds": microseconds / 1e6, "calls": calls})
    return lines


def write_json(path: str, values: dict[str, Any]) -> None:
    """Save the figures if --json names a file."""
    if path:
        save_json(path, values)
