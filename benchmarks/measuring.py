"""What the benchmarks share: the machine's rate, counted operations, alternating runs, tables."""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch as th

from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.runtime.memory import keep_freed_memory

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


@dataclass
class Case:
    """Something to time. `work` is in operations, `images` a call; `seconds` are filled in."""

    name: str
    call: Callable[[], Any]
    work: float
    precision: str = "fp32"
    images: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Settings:
    """The benchmark; model flags change the network."""

    TITLE = "Benchmark; flags of the network change the network measured"

    device: str = flag("", "cpu or cuda; '': a GPU if there is one")
    threads: int = flag(0, "of the CPU; 0: torch's choice")
    json: str = flag("", "also write the numbers here")


@dataclass(frozen=True)
class TimedSettings(Settings):
    """The benchmark; model flags change the network."""

    precision: str = flag("fp32,bf16", "those that the machine computes no slower than fp32")
    rounds: int = flag(5, "timings of each case; medians count")
    profile: int = flag(0, "also print this many operations (kernels on a GPU) that take longest")


def begin(settings: Settings) -> th.device:
    """The device, threads and memory set as asked and as the project's own commands have them."""
    if settings.threads:
        th.set_num_threads(settings.threads)
    keep_freed_memory()
    device = choose_device(settings.device)
    print(describe(device))
    return device


def choose_device(name: str) -> th.device:
    """The device of that name; for "" a GPU if there is one.

    :raises UserError: if there is no such device here.
    """
    if name not in ("", "cpu") and not re.fullmatch(r"cuda(:\d+)?", name):
        raise UserError(f"--device {name}: cpu, cuda, or cuda and a number such as cuda:1")
    gpus = th.cuda.device_count() if th.cuda.is_available() else 0
    if name.startswith("cuda") and int(name[5:] or 0) >= gpus:
        raise UserError(
            f"--device {name}: torch finds {gpus} GPUs here; without --device the benchmark runs on"
            f" {'a GPU' if gpus else 'the CPU'}"
        )
    if not (name or gpus):
        print("no GPU found: this is a measurement of the CPU")
    return th.device(name or ("cuda" if gpus else "cpu"))


def autocast(device: th.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which a network computes in this precision."""
    return th.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def describe(device: th.device) -> str:
    if device.type == "cuda":
        name = th.cuda.get_device_name(device)
    else:
        name = f"{th.get_num_threads()} threads, {th.backends.cpu.get_cpu_capability()}"
    return f"{device.type} ({name}), torch {th.__version__}"


def _elapsed(call: Callable[[], Any], device: th.device) -> float:
    if device.type == "cuda":
        th.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        th.cuda.synchronize(device)
    return time.perf_counter() - began


def product(precision: str, device: th.device) -> Case:
    """A matrix product large enough to reach the machine's rate."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = (th.randn(side, side, device=device).to(PRECISIONS[precision]) for _ in range(2))
    return Case(f"product {precision}", lambda: left @ right, 2 * side**3, precision)


def alternate(cases: Sequence[Case], device: th.device, rounds: int) -> dict[str, float]:
    """Time the cases in turn, matrix products between them; fills in `seconds`.

    :return: the machine's median rate in each precision, operations per second.
    """
    products = {c.precision: product(c.precision, device) for c in cases}
    for case in [*products.values(), *cases]:
        case.call()  # the first call builds what later ones reuse
    for _ in range(rounds):
        for case in cases:
            beat = products[case.precision]
            beat.seconds.append(_elapsed(beat.call, device))
            case.seconds.append(_elapsed(case.call, device))
    return {name: beat.work / beat.median for name, beat in products.items()}


def usable_precisions(wanted: str, device: th.device) -> list[str]:
    """Those of "fp32,bf16,fp16" that the machine computes no slower than float32."""
    chosen = []
    reference = product("fp32", device)
    for name in wanted.split(","):
        if name not in PRECISIONS:
            raise UserError(f"--precision {name}: choose from {', '.join(PRECISIONS)}")
        if name != "fp32":
            if device.type == "cpu" and name == "fp16":
                print("fp16 is left out: it needs CUDA")
                continue
            other = product(name, device)
            for case in (reference, other):
                case.call()
                case.seconds = [_elapsed(case.call, device) for _ in range(3)]
            if other.median > reference.median:
                ratio = reference.median / other.median
                print(f"{name} is left out: its products run at {ratio:.2f} of float32's rate here")
                continue
        chosen.append(name)
    return chosen


def peak_memory(arguments: Sequence[str]) -> float:
    """Peak memory, bytes, of this very script run again with `arguments` on a CPU."""
    script = sys.argv[0]
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def report_own_peak() -> None:
    """The last line of a process that `peak_memory` started."""
    with open("/proc/self/status") as file:  # getrusage would tell the parent's peak
        peak = next(line for line in file if line.startswith("VmHWM:"))
    print(int(peak.split()[1]) * 1024)


def table(cases: Sequence[Case], rates: dict[str, float]) -> list[dict[str, Any]]:
    """Print a line a case; the same as plain values."""
    for precision, rate in rates.items():
        print(f"matrix product {precision}: {rate / 1e9:.0f} GFLOP/s")
    width = max(len(case.name) for case in cases)
    head = f"{'case':{width}} {'precision':9} {'s (median)':>10} {'images/s':>9}"
    print(f"{head} {'GFLOP':>8} {'of rate':>8}")
    lines = []
    for case in cases:
        share = case.work / case.median / rates[case.precision]
        print(
            f"{case.name:{width}} {case.precision:9} {case.median:10.4f} "
            f"{case.images / case.median:9.2f} {case.work / 1e9:8.1f} {share:8.1%}"
        )
        lines.append(
            {
                "case": case.name,
                "precision": case.precision,
                "seconds": case.median,
                "images_per_second": case.images / case.median,
                "operations": case.work,
                "share_of_matrix_rate": share,
            }
        )
    return lines


def report(cases: Sequence[Case], device: th.device, settings: TimedSettings) -> dict[str, Any]:
    """Time the cases and print their table; all of it as plain values."""
    rates = alternate(cases, device, settings.rounds)
    values = {"device": describe(device), "rates": rates, "lines": table(cases, rates)}
    if settings.profile:
        values["profiles"] = {
            f"{case.name} {case.precision}": profile(case, device, settings.profile)
            for case in cases
        }
    return values


def profile(case: Case, device: th.device, number: int) -> list[dict[str, Any]]:
    """Print where a call spends its time, longest first; the same as plain values.

    :param number: of operations on a CPU, each without what it calls, or of kernels on CUDA.
    """
    activity = getattr(th.profiler.ProfilerActivity, device.type.upper())
    with th.profiler.profile(activities=[activity]) as profiler:
        _elapsed(case.call, device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [(getattr(e, attribute), e.count, e.key) for e in profiler.key_averages()]
    total = sum(microseconds for microseconds, *_ in found)
    print(f"{case.name} {case.precision}: {total / 1e6:.4f} s")
    lines = []
    for microseconds, calls, name in sorted(found, reverse=True)[:number]:
        print(f"  {microseconds / total:6.1%} {calls:6} calls  {name[:100]}")
        lines.append({"name": name, "seconds": microseconds / 1e6, "calls": calls})
    return lines


def write_json(path: str, values: dict[str, Any]) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(values, file, indent=2)
