"""The flags of networks whose values a command reads from a checkpoint, as its help shows them.

They are for checkpoints of the original package, which no config.json describes, and for what may
change.
"""

from collections.abc import Sequence

from guided_diffusion.networks.config import DiffusionConfig, NetworkConfig
from guided_diffusion.runtime.command_line.parsing import Part

FROM_CHECKPOINT = "from the checkpoint"
# then told by the weights' shapes: flags may repeat them
IN_SHAPES = (
    *("in_channels", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions"),
    *("class_cond", "num_classes", "cond_drop_prob", "use_scale_shift_norm", "resblock_updown"),
    "learn_sigma",
)
# without an effect on a network that is no longer trained
OF_TRAINING = ("dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas")


def network_part(
    config: type[NetworkConfig], ignored: Sequence[str] = (), title: str = "Network"
) -> Part:
    """The network's flags; `ignored` ones have no effect."""
    return Part(config, FROM_CHECKPOINT, title=_read(title), ignored=ignored)


def process_part(ignored: Sequence[str] = OF_TRAINING, basic: Sequence[str] | None = None) -> Part:
    """The diffusion process's flags; `ignored` ones have no effect."""
    title = _read("Diffusion process")
    return Part(DiffusionConfig, FROM_CHECKPOINT, title=title, ignored=ignored, basic=basic)


def _read(title: str) -> str:
    return f"{title} (read from the checkpoint)"
