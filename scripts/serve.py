"""Serve a local web page that segments radiographs: upload a file, view and download the result.

serve.py MODEL   or several models, with commas: their mean
"""

import argparse
import threading

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import from_flags, make_parser
from guided_diffusion.segmentation.inference.job import AveragingConfig
from guided_diffusion.segmentation.inference.serve import ServeConfig, import_gradio, served


def main() -> int:
    parser = make_parser(__doc__, ServeConfig, AveragingConfig)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="model file of finetune.py")
    overrides = vars(parser.parse_args())
    import_gradio()
    predictor = from_flags(AveragingConfig, overrides).load(overrides["model"], dist_util.dev())
    with served(predictor, overrides["model"], from_flags(ServeConfig, overrides)) as address:
        print(f"open {address} in a browser; Ctrl-C stops the server", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")
    return 0


if __name__ == "__main__":
    command(main)()
