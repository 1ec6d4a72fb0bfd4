"""Pages that hold their pictures and figures themselves, and load nothing from elsewhere."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_DATA, _SCRIPT = "/*DATA*/", "/*SCRIPT*/"


def fill(template: str, plain: dict[str, Any], *scripts: str) -> str:
    """A page of this folder with the values that its scripts read.

    :param template: the name of its file.
    :param scripts: the names of files to put where it says so.
    """
    page = read(template).replace(_SCRIPT, "".join(map(read, scripts)), 1)
    # so that "</script>" or "<!--" in a name does not end the script
    text = json.dumps(plain, allow_nan=False).replace("<", "\\u003c")
    return page.replace(_DATA, text, 1)


def read(name: str) -> str:
    """A file of this folder."""
    return Path(__file__).with_name(name).read_text("utf-8")


def as_uint8(image: np.ndarray) -> np.ndarray:
    """An image as read, uint8 or floats in [0, 1], as uint8."""
    if image.dtype == np.uint8:
        return image
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def scaled(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A picture of a width and a height, interpolated."""
    return Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2)


def size_within(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Width and height of `[H x W ...]`, reduced until neither exceeds `side`."""
    height, width = shape[:2]
    scale = min(1.0, side / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def picture_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """An address that holds a picture, such as a "JPEG"; :param options: of Pillow."""
    encoded = io.BytesIO()
    picture.save(encoded, kind, **options)
    return data_uri(f"image/{kind.lower()}", encoded.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """An address that holds a file of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
