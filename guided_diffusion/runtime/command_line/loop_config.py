"""The flags of the training loop."""

import dataclasses

from guided_diffusion.runtime.command_line.flags import MOST_BATCH, MOST_SEED, flag
from guided_diffusion.runtime.command_line.precision_flag import precision_flag


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Settings of the training loop."""

    batch_size: int = flag(1, "images per rank per step", least=1, most=MOST_BATCH, basic=True)
    microbatch: int = flag(
        -1, "images per forward pass, to save memory; -1: all", least=-1, basic=True
    )
    lr: float = flag(1e-4, "learning rate of AdamW", least=0, basic=True)
    weight_decay: float = flag(0.0, "decoupled weight decay of AdamW", least=0)
    lr_anneal_steps: int = flag(
        0,
        "steps over which lr falls linearly to 0, ending the run; 0: constant",
        least=0,
        basic=True,
    )
    max_steps: int = flag(
        0, "steps until the end; 0: lr_anneal_steps, or for ever", least=0, basic=True
    )
    max_grad_norm: float = flag(1.0, "clip gradients to this 2-norm; 0: no clipping", least=0)
    max_skipped_steps: int = flag(
        100, "stop after this many consecutive steps with non-finite gradients; 0: never", least=0
    )
    ema_rate: float | str = flag(
        "0.9999",
        "decay rates of the exponential moving averages of the weights, comma-separated",
        basic=True,
    )
    ema_warmup: bool = flag(True, "lower decay at the start: min(rate, (1+n)/(10+n)) at step n")
    precision: str = precision_flag()
    fp16_scale_growth: float = flag(1e-3, "log2 growth of the loss scale a step", least=0, most=1)
    seed: int = flag(0, "of weights, image order, timesteps, noise", least=0, most=MOST_SEED)
    log_interval: int = flag(10, "steps between rows of the log", least=1)
    save_interval: int = flag(10000, "steps between checkpoints", least=1, basic=True)
    save_minutes: float = flag(
        30.0,
        "also save when this many minutes have passed since the last checkpoint; the next one"
        " replaces it; 0: never",
        least=0,
    )
    save_initial: bool = flag(False, "also save the initial weights at step 0")
    keep_checkpoints: int = flag(0, "number of most recent checkpoints to keep; 0: all", least=0)
    sample_interval: int = flag(10000, "steps between grids of samples; 0: none", least=0)
    resume_checkpoint: str = flag(
        "",
        "auto: the newest in the run folder; none: start from scratch; or a file",
        metavar="auto|none|FILE",
        default_words="auto",
    )
    compile: bool = flag(
        False, "compile the network: minutes at the start, then faster steps on GPUs"
    )
