"""Peak memory of the training loop's step in one precision.

    python benchmarks/step_memory.py --precision fp16 [--limit_gb 8] [model flags]

The step is that of scripts/image_train.py: microbatches, losses, clipping, AdamW and one moving
average. On CUDA the peak is that of torch's allocator, without the CUDA context; on a CPU that of
the process. Ends with exit code 1 if it is above the limit.
"""

import dataclasses
import tempfile

import measuring
import torch as th
from train_step import StepBench

from guided_diffusion import logger
from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.errors import UserError, command


@dataclasses.dataclass(frozen=True)
class Settings(measuring.Settings):
    """Benchmark settings; the model flags define the network to measure."""

    precision: str = flag(
        "fp16", "fp32, fp16 or bf16", choices=tuple(measuring.PRECISIONS), basic=True
    )
    batch_size: int = flag(4, "images per step", least=1, basic=True)
    microbatch: int = flag(1, "images per forward pass; -1: the whole batch", least=-1, basic=True)
    limit_gb: float = flag(
        0.0, "the peak must stay below this many GB; 0: no limit", least=0, basic=True
    )


def main() -> int:
    settings, config, _ = measuring.parse_benchmark_flags(__doc__, Settings)
    device = measuring.set_up_device(settings)
    if settings.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs CUDA: choose fp32 or bf16")
    bench = StepBench(config, settings, device)
    batch = bench.images.cpu()
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["csv"]):
        loop = bench.loop(settings.precision)
        for _ in range(2):  # the second also has the optimizer's state from the start
            loop.run_step(batch, {})
    values = {
        "device": measuring.describe(device),
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "microbatch": settings.microbatch,
        "limit": settings.limit_gb * 1e9,
        **peaks(device),
    }
    below = not settings.limit_gb or values["peak"] < values["limit"]
    measuring.write_json(settings.json, values)
    limit = f", {'below' if below else 'ABOVE'} {settings.limit_gb:g} GB" if values["limit"] else ""
    print(
        f"peak memory of a step of {settings.batch_size} images, {settings.microbatch} at a time,"
        f" in {settings.precision}: {values['peak'] / 1e9:.2f} GB{limit}"
    )
    return 0 if below else 1


def peaks(device: th.device) -> dict[str, float]:
    """Peak bytes of this process: "peak", and on CUDA "reserved" and "on_card" as well.

    reserved: held by torch's allocator, gaps included. on_card: in use on the card by the end, by
    whatever process, the CUDA context included.
    """
    if device.type != "cuda":
        return {"peak": measuring.own_peak()}
    free, total = th.cuda.mem_get_info(device)
    return {
        "peak": th.cuda.max_memory_allocated(device),
        "reserved": th.cuda.max_memory_reserved(device),
        "on_card": total - free,
    }


if __name__ == "__main__":
    command(main)()
