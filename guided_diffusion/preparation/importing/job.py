"""What tools/import_labels.py does: annotations of other tools to images and index masks."""

import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence

import numpy as np

from guided_diffusion.images.image_io import ImageError, read_image
from guided_diffusion.images.masks import write_mask
from guided_diffusion.images.names import ending
from guided_diffusion.preparation.config import ImportConfig
from guided_diffusion.preparation.importing import colours
from guided_diffusion.preparation.importing.classes import Classes, plan
from guided_diffusion.preparation.importing.drawing import draw, vote
from guided_diffusion.preparation.importing.items import ImageItem, find_items
from guided_diffusion.preparation.importing.joining import REPORT, Target
from guided_diffusion.preparation.importing.report import Report, say
from guided_diffusion.preparation.layouts import require_new_folder
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import track
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.storage.files import copy_file, save_json
from guided_diffusion.runtime.storage.together import STAGE, complete
from guided_diffusion.segmentation.annotations.reading import formats
from guided_diffusion.segmentation.annotations.reading.source import Drawing, Options, Size, Source
from guided_diffusion.segmentation.categories import TABLE_NAME, to_plain

IMAGES, MASKS = "IMG", "MASK"


def import_labels(source: str, output: str, config: ImportConfig) -> Report:
    """Convert annotations to OUTPUT/IMG, OUTPUT/MASK, categories.json and import.json.

    :param source: file or folder of an annotation tool.
    :param output: a folder that does not exist or is empty; "" if `config.into` names one to join.
    :raises UserError: before anything is written, naming the file and the annotation at fault.
    """
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist")
    if os.path.isfile(source) and zipfile.is_zipfile(source):
        raise UserError(f"{source} is an archive; unpack it, and name the folder")
    _check_flags(output, config)
    if output:
        folder = source if os.path.isdir(source) else ""
        require_new_folder(output, folder, config.images, flag="OUTPUT", left=STAGE)
    if config.images and not os.path.isdir(config.images):
        raise UserError(f"--images {config.images} is not a folder")
    try:
        with tempfile.TemporaryDirectory() as scratch, run_lock.released():
            return _convert(source, output, scratch, config)
    finally:
        formats.forget()


def _check_flags(output: str, config: ImportConfig) -> None:
    if config.into:
        if output:
            raise UserError(f"give either OUTPUT ({output}) or --into {config.into}, not both")
        return
    if not output:
        raise UserError(
            "the following arguments are required: output, or --into with a folder to join (see"
            " --help)"
        )
    for name in ("avoid", "replace", "group"):
        if getattr(config, name):
            raise UserError(f"--{name} needs --into, the folder that the images join")


def _convert(source: str, output: str, scratch: str, config: ImportConfig) -> Report:
    target = Target.open(config) if config.into else None
    if target:
        run_lock.hold_folder(target.folder, "name another folder")
    name, found = _read(source, config)
    if not found.classes:
        raise _nothing(source, found)
    classes = plan(
        found.classes,
        config.map,
        config.priority,
        target.table_path if target else config.categories,
        config.unlabelled == "ignore",
        source,
    )
    folder = config.images or (source if os.path.isdir(source) else os.path.dirname(source) or ".")
    items = find_items(found, folder, scratch, config)
    if not items:
        raise _nothing(source, found)
    unlabelled = 0 if config.unlabelled == "background" else classes.table.ignored[0].index
    report = Report(name, source, classes.table)
    sizes: dict[str, Size] = {}
    for item in track(items, "checking"):
        sizes[item.name] = _checked_size(item)
        mask = _mask(item, sizes[item.name], classes, unlabelled, found)
        report.add(item, mask)
        if target:
            target.check_values(item, mask)
    _note_left_out(found.drawings, classes, found)
    report.left_out = found.left_out

    def mask_of(item: ImageItem) -> np.ndarray:
        return _mask(item, sizes[item.name], classes, unlabelled)

    if target:
        said = target.join(target.place(items, sizes, config), mask_of, report)
        say(report, target.folder)
        print(said)
        return report
    with complete(output) as stage:
        for item in track(items, "writing"):
            copy_file(item.path, os.path.join(stage, IMAGES, item.name + ending(item.path)))
            write_mask(os.path.join(stage, MASKS, f"{item.name}.png"), mask_of(item))
        save_json(os.path.join(stage, TABLE_NAME), to_plain(classes.table))
        save_json(os.path.join(stage, REPORT), report.to_plain())
    say(report, output)
    return report


def _nothing(source: str, found: Source) -> UserError:
    why = Counter(one.why for one in found.left_out).most_common(1)
    reason = f": {why[0][1]} x left out, {why[0][0]}" if why else ""
    return UserError(f"{source} holds no annotated image{reason}")


def _read(source: str, config: ImportConfig) -> tuple[str, Source]:
    """The format and the annotations."""
    name, paths = config.format, [source]
    if name == "auto":
        name, paths = formats.recognise(source)
        if not name and os.path.isdir(source) and colours.recognises(source):
            name = "colours"
        if not name:
            titles = [module.TITLE for module in formats.FORMATS.values()]
            raise UserError(
                f"{source} holds no annotations of {', '.join(titles)}, nor {colours.TITLE} beside"
                " images; see docs/labelling.md for what to export"
            )
    elif name != "colours":
        paths = formats.files_of(source, name)
    if name == "colours":
        return name, colours.read(source, config.categories)
    options = Options(config.images, config.attribute, config.line_width)
    found = formats.read(name, paths, options)
    for other in formats.others(source, paths) if name in formats.OF_FILES else ():
        found.omit(other, f"no annotations of {formats.FORMATS[name].TITLE}")
    return name, found


def _checked_size(item: ImageItem) -> Size:
    """The size of an image as it is read; those that the source states must agree with it.

    :raises UserError: naming both.
    """
    try:
        height, width = read_image(item.path).shape[:2]
    except ImageError as error:
        raise ImageError(str(error).replace(item.path, item.origin)) from error
    for drawing in item.drawings:
        if drawing.size is not None and drawing.size != (height, width):
            turned = drawing.size == (width, height)
            raise UserError(
                f"{drawing.where} was drawn on {drawing.size[0]} x {drawing.size[1]} pixels (height"
                f" x width), {item.origin} has {height} x {width}; "
                + (
                    "is it turned by EXIF, which the tool did not apply? Remove the tag from the"
                    " image"
                    if turned
                    else "find the image on which it was drawn, or draw it again"
                )
            )
    return height, width


def _mask(
    item: ImageItem, size: Size, classes: Classes, unlabelled: int, notes: Source | None = None
) -> np.ndarray:
    masks = [draw(drawing, size, classes, unlabelled, notes) for drawing in item.drawings]
    return masks[0] if len(masks) == 1 else vote(masks, unlabelled)


def _note_left_out(drawings: Sequence[Drawing], classes: Classes, source: Source) -> None:
    counts = Counter(
        region.name
        for drawing in drawings
        for region in drawing.regions
        if classes.value[region.name] is None
    )
    for name, count in sorted(counts.items()):
        source.omit(f"{count} annotations of {name}", "--map leaves the class out")
