"""Image files that a text file holds in base64."""

import base64
import binascii
import io

import numpy as np

from guided_diffusion.images.image_io import MAX_PIXELS, image_errors
from guided_diffusion.segmentation.annotations.reading.node import Node

_ENDINGS = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"BM": ".bmp",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
# an image within the limit of pixels, of 16 bits and four channels, does not exceed this
_MOST_BYTES = MAX_PIXELS * 8


def ending_of(content: bytes) -> str | None:
    """The ending of image files that begin like this; None if it is no image that is read."""
    return next((end for magic, end in _ENDINGS.items() if content.startswith(magic)), None)


def decode(node: Node) -> bytes:
    """The content of a file in base64.

    :raises UserError: if it is none, or larger than any image that is read.
    """
    text = node.value
    if not isinstance(text, str) or len(text) * 3 // 4 > _MOST_BYTES:
        raise node.fail("a file in base64 of a usual size")
    text = text.rpartition("base64,")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise node.fail("a file in base64") from error


def mask_of(node: Node) -> np.ndarray:
    """A small image in base64 as a mask: bool [H x W], True where it is neither black nor clear.

    :raises UserError: if it is no image.
    """
    content = decode(node)
    from PIL import Image

    with image_errors(node.where):
        picture = Image.open(io.BytesIO(content), formats=("PNG",))
        if picture.width * picture.height > MAX_PIXELS:
            raise node.fail(f"an image of at most {MAX_PIXELS} pixels")
        if "A" in picture.getbands() or picture.has_transparency_data:
            return np.asarray(picture.convert("RGBA").getchannel("A")) >= 128
        return np.asarray(picture.convert("L")) > 0
