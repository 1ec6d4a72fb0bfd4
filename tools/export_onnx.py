"""Export a segmentation model to ONNX, with classes and preprocessing in the file's metadata.

export_onnx.py MODEL [OUTPUT]   OUTPUT defaults to MODEL with the ending .onnx
"""

import os

import _path  # noqa: F401 - makes the package importable without installing it

from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import MessagesConfig, begin
from guided_diffusion.runtime.errors import command


def default_output(model: str) -> str:
    """Beside a file or folder; in the current folder for a model of the Hub."""
    base = model.rstrip("/")
    if "://" in base:
        base = base.rsplit("/", 1)[-1]
    elif not os.path.isdir(model):
        base = os.path.splitext(base)[0]
    return f"{base}.onnx"


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, MessagesConfig)
    flags.add_argument(
        "model", help="model file written by finetune.py or baseline_train.py, or a packed model"
    )
    flags.add_argument("output", nargs="?", help="ONNX file to write")
    add_instead(flags, "model", "--model", "--checkpoint", "-m")
    add_instead(flags, "output", "-o", "--output")
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.inference.onnx_export import CHECKED_SIZES, TOLERANCE, export

    model = overrides["model"]
    output = overrides.get("output") or default_output(model)
    for name, value in export(model, output).items():
        print(f"{name}: {value}")
    sizes = ", ".join(f"{count}x{height}x{width}" for count, height, width in CHECKED_SIZES)
    print(f"written: {output}; equal to {TOLERANCE:g} under onnxruntime for images of {sizes}")


if __name__ == "__main__":
    command(main)()
