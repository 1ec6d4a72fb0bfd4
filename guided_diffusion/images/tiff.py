"""What Pillow needs to be told about TIFF files: its errors in them are silent ones."""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from guided_diffusion.images.decoded import DecodedImage, Undecodable

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats", 6: "complex numbers"}
# libtiff decodes to the machine's order, so that Pillow must not swap the bytes again
_SWAPPED = {"F;32BF": "F;32F", "I;16BS": "I;16S", "I;32BS": "I;32S"}


def unsupported(file: BinaryIO) -> Undecodable:
    """Why Pillow recognises nothing in a file that begins as TIFF."""
    samples, bits, kind = 1, 0, 1
    with contextlib.suppress(Exception):  # damaged directories raise anything
        file.seek(0)
        head = file.read(8)
        head += file.read(8) if b"+" in head[2:4] else b""
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
        samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        kind = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
    what = f" ({samples} x {bits} bits, {_KINDS.get(kind, 'undefined')})" if bits else ""
    return Undecodable(
        f"it is TIFF that is damaged or of a kind that is not supported{what}; convert it to grey"
        " or colour of 8 or 16 bits, or to grey floats of 32 bits"
    )


def mend(picture: TiffImagePlugin.TiffImageFile) -> None:
    """Correct what Pillow would decode wrongly without an error. To be called before `load`.

    :raises Undecodable: if rows are missing, which would be black.
    """
    tags, tiles = picture.tag_v2, picture.tile
    rows = max((tile.extents[3] for tile in tiles if tile.extents), default=None)
    claimed = tags[TiffImagePlugin.IMAGELENGTH]
    if rows is not None and rows < claimed:
        raise Undecodable(
            f"it is damaged: only {rows} of its {claimed} rows are there; copy it again"
        )
    order = "B" if tags.prefix == b"MM" else "L"
    deep_planes = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0] == 16 and len(tiles) > 1
    mended = []
    for tile in tiles:
        mode, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if tile.codec_name == "libtiff":
            mode = _SWAPPED.get(mode, mode)
        elif deep_planes and len(mode) == 1 and mode in "RGBA" and picture.mode != "L":
            mode += ";16" + order  # a plane, which Pillow takes for bytes
        mended.append(tile._replace(args=(mode, *rest)))
    picture.tile = mended
    colours = tags.get(TiffImagePlugin.COLORMAP)
    if picture.mode == "P" and colours and max(colours) < 256:  # bytes, where words belong
        columns = np.reshape(colours, (3, -1)).T
        picture.putpalette(columns.astype(np.uint8).tobytes())


def deep_values(picture: Image.Image) -> DecodedImage:
    """One channel of more than 8 bits, or signed. Only TIFF has tags for depth and sign."""
    values = np.array(picture)
    tags = getattr(picture, "tag_v2", {})
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if picture.mode == "F":
        return DecodedImage(values, None, inverted)
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    if is_signed(picture):
        values = values.view(np.int8) if bits == 8 else values  # Pillow takes them for unsigned
        return DecodedImage(values, (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1), inverted)
    if bits == 32:
        values = values.view(np.uint32)  # Pillow takes them for signed
    return DecodedImage(values, (0.0, 2.0**bits - 1), inverted)


def is_signed(picture: Image.Image) -> bool:
    return getattr(picture, "tag_v2", {}).get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2


@contextlib.contextmanager
def silent_libtiff() -> Iterator[None]:
    """Discard what libtiff prints to the stderr of the process; Pillow raises it as well."""
    try:
        kept = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
