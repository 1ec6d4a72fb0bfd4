"""Write a segmentation model as ONNX, with what its users must know in the file's metadata.

export_onnx.py MODEL [OUTPUT]   OUTPUT: by default MODEL with the ending .onnx
"""

import argparse
import os

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import make_parser
from guided_diffusion.segmentation.inference.onnx_export import CHECKED_SIZES, TOLERANCE, export


def main() -> None:
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="file that finetune.py or baseline_train.py wrote")
    parser.add_argument("output", nargs="?", help="file to write")
    overrides = parser.parse_args()
    output = getattr(overrides, "output", None) or os.path.splitext(overrides.model)[0] + ".onnx"
    for name, value in export(overrides.model, output).items():
        print(f"{name}: {value}")
    sizes = ", ".join(f"{count}x{height}x{width}" for count, height, width in CHECKED_SIZES)
    print(f"written: {output}; equal to {TOLERANCE:g} under onnxruntime for images of {sizes}")


if __name__ == "__main__":
    command(main)()
