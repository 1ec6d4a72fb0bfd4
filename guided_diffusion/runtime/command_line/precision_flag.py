"""The flag --precision, which all commands that run a network have."""

from typing import Any

from guided_diffusion.runtime.command_line.flags import flag

# the keys of `networks.precision.PRECISIONS`
NAMES = ("fp32", "fp16", "bf16")
# values of the flag that leave the precision to the device
AUTO = ("", "auto")


def precision_flag(default: str = "") -> Any:
    """The field of a configuration.

    :param default: "" leaves it to the device; "fp32" is for figures that are compared between
        machines.
    """
    return flag(
        default,
        "of the network: fp32, bf16, or fp16 (on a GPU); auto: bf16 on a CPU that computes it"
        " faster than fp32, fp16 on a GPU with use_fp16, fp32 otherwise; a resumed run keeps its"
        " own",
        default_words=default or "auto",
        choices=(*AUTO, *NAMES),
    )
