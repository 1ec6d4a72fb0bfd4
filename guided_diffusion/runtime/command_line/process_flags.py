"""The flags of every command about its process as a whole: what it says, where it computes.

overrides = begin(parse_flags(parser()))
"""

import argparse
import re
from dataclasses import dataclass, replace
from typing import Any

from guided_diffusion.runtime import messages, session
from guided_diffusion.runtime.command_line.flags import Overrides, flag


def device_name(text: str) -> str:
    """A value of --device.

    :raises argparse.ArgumentTypeError: if it is none.
    """
    if not re.fullmatch(r"|cpu|mps|cuda(:\d{1,4})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:N (cuda:1) and mps")
    return text


@dataclass(frozen=True)
class MessagesConfig:
    """What a command says."""

    TITLE = "Process"

    quiet: bool = flag(False, "neither notes nor progress bars: results, warnings and errors alone")


@dataclass(frozen=True)
class ProcessConfig(MessagesConfig):
    """What a command says, and where it computes."""

    device: str = flag(
        "",
        "where to compute: cpu, cuda, cuda:N for the GPU of that number, or mps (Apple); '': as"
        " GUIDED_DIFFUSION_DEVICE says, else cuda where there is a GPU for it, else cpu",
        type=device_name,
        metavar="DEVICE",
    )


def begin(overrides: Overrides) -> dict[str, Any]:
    """Let the flags of ProcessConfig take effect; returns the others.

    The device is looked for when it is needed first, see `devices.py`.
    """
    rest = dict(overrides)
    quiet, device = rest.pop("quiet", False), rest.pop("device", "")
    messages.announce("")  # of a command before in this process
    session.enter(replace(session.current(), quiet=quiet, device=device))
    return rest
