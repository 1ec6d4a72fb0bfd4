"""Pack a network into a folder to share: model.safetensors, config.json and a model card.

pack_model.py MODEL OUT   MODEL: segm.pth, or a pretraining's ema_*.pt with config.json beside it
"""

import _path  # noqa: F401 - makes the package importable without installing it

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import MessagesConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.sharing.config import PackConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, PackConfig, MessagesConfig)
    flags.add_argument("model", help="model file of finetune.py, or a pretrained checkpoint")
    flags.add_argument("output", metavar="OUT", help="folder to write, for predict.py and others")
    add_instead(flags, "model", "--model", "--checkpoint", "-m")
    add_instead(flags, "output", "-o", "--output")
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.sharing.pack import pack

    pack(overrides["model"], overrides["output"], from_flags(PackConfig, overrides))


if __name__ == "__main__":
    command(main)()
