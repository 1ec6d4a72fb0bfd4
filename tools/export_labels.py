"""Write index masks as files of annotation tools: coco, labelme, cvat, dicomseg, nifti, nrrd.

export_labels.py MASKS IMAGES OUTPUT --format coco,labelme    OUTPUT/coco, OUTPUT/labelme
"""

import _path  # noqa: F401 - makes the package importable without installing it

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.instead import add_instead
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import MessagesConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.annotations.writing.config import ExportLabelsConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    flags = make_parser(__doc__, ExportLabelsConfig, MessagesConfig)
    flags.add_argument("masks", help="folder of index masks, or one; or a folder of predict.py")
    flags.add_argument("images", help="folder of their radiographs, or one file")
    flags.add_argument("output", help="folder to write; a folder in it for each format")
    add_instead(flags, "output", "-o", "--output")
    return flags


def main() -> None:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion.segmentation.annotations.writing.job import export_labels

    paths = [overrides.pop(name) for name in ("masks", "images", "output")]
    export_labels(*paths, from_flags(ExportLabelsConfig, overrides))


if __name__ == "__main__":
    command(main)()
