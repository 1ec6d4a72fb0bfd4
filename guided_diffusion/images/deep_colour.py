"""Colour of 16 bits per channel, of which Pillow keeps the upper 8: it is decoded twice."""

import sys
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from guided_diffusion.images import tiff
from guided_diffusion.images.decoded import Undecodable

_NATIVE = "L" if sys.byteorder == "little" else "B"
_OTHER = {"L": "B", "B": "L"}


def low_bytes(picture: ImageFile.ImageFile, file: BinaryIO) -> Image.Image | None:
    """The same picture of the lower bytes alone; None if it has no colour of 16 bits.

    Sets `picture` to decode the upper bytes. To be called before `load`, with the file that it was
    opened from. Grey with alpha becomes one picture: upper and lower bytes of both as RGBA.
    """
    modes = [_raw_mode(tile) for tile in picture.tile]
    if modes == ["LA;16B"]:
        picture.tile = [picture.tile[0]._replace(args="RGBA")]
        return picture
    if not modes or not all(mode[:1] in "RGBA" and mode[-4:-1] == ";16" for mode in modes):
        return None
    tags = getattr(picture, "tag_v2", {})
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and len(modes) == 1:
        raise Undecodable(
            "it is TIFF of 16-bit colour in compressed planes, of which Pillow reads only half the"
            " bits; save it without compression or planes, or as PNG"
        )
    # alpha that colours were multiplied by already: what black shows, without looking at alpha
    picture.info["shown_on_black"] = any(mode.startswith("RGBa") for mode in modes)
    low = _opened_again(picture, file)
    for one, swap in ((picture, False), (low, True)):
        one.tile = [tile._replace(args=_with_mode(tile, swap)) for tile in one.tile]
    low.load()
    ImageOps.exif_transpose(low, in_place=True)
    return low


def join(picture: Image.Image, low: Image.Image) -> np.ndarray:
    """Both decoded halves as uint16 [H x W x C]; C is 2 (grey, alpha), 3 or 4 (with alpha)."""
    high = np.asarray(picture).astype(np.uint16)
    if low is picture:
        return high[..., ::2] << 8 | high[..., 1::2]
    values = high << 8 | np.asarray(low)
    return values[..., :3] if picture.info.get("shown_on_black") else values


def on_black(values: np.ndarray) -> np.ndarray:
    """[H x W] or [H x W x 3] of what `join` returned; transparent pixels are shown on black."""
    if values.shape[-1] == 3:
        return values
    alpha = values[..., -1:] / 65535
    shown = np.rint(values[..., :-1] * alpha).astype(np.uint16)
    return shown[..., 0] if shown.shape[-1] == 1 else shown


def _raw_mode(tile: tuple) -> str:
    arguments = tile[3]
    return arguments if isinstance(arguments, str) else str((arguments or ("",))[0])


def _with_mode(tile: tuple, swap: bool) -> str | tuple:
    """The arguments of a tile that decode the upper bytes, or by a swap the lower ones."""
    mode, _, order = _raw_mode(tile).partition(";16")
    order = _NATIVE if order == "N" else order
    mode = mode.replace("a", "A")  # of multiplied colours: Pillow would divide by alpha
    mode = f"{mode};16{_OTHER[order] if swap else order}"
    return mode if isinstance(tile[3], str) else (mode, *tile[3][1:])


def _opened_again(picture: ImageFile.ImageFile, file: BinaryIO) -> ImageFile.ImageFile:
    file.seek(0)
    again = Image.open(file, formats=[picture.format or ""])
    if isinstance(again, TiffImagePlugin.TiffImageFile):
        tiff.mend(again)
    return again
