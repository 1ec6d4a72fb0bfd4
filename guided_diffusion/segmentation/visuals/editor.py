"""A page with a brush and an eraser, to correct a mask at the radiograph's own size."""

import base64
import zlib
from collections.abc import Sequence

import numpy as np

from guided_diffusion.runtime.text import visible
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.visuals.embedded import (
    as_uint8,
    fill,
    picture_uri,
    read,
    scaled,
    size_within,
)

# what browsers can show as one canvas: height times width, and the longer of the two
MOST_PIXELS = 64_000_000
LONGEST_SIDE = 16_000
# the longest side of the radiograph's picture; the mask is not reduced
_PICTURE_SIDE = 4096


def can_edit(height_width: tuple[int, int]) -> bool:
    """Whether browsers can show a mask of this size."""
    height, width = height_width
    return height * width <= MOST_PIXELS and max(height, width) <= LONGEST_SIDE


def relay() -> str:
    """A script element for the page around the editor: it sends masks to the server."""
    return read("editor_relay.html")


def editor_page(
    name: str,
    image: np.ndarray,
    mask: np.ndarray,
    categories: Sequence[Category],
    token: str,
    note: str = "Not saved yet.",
) -> str:
    """The page as text. It only sends messages to the page around it, see `relay`.

    :param image: as read, `[H x W]` or `[H x W x 3]`.
    :param mask: class indices, uint8 `[H x W]`, to begin with.
    :param categories: the values that can be painted, the background first.
    :param token: the server's key to this radiograph.
    :param note: what to say until it is saved.
    """
    height, width = mask.shape
    picture = scaled(as_uint8(image), size_within(mask.shape, _PICTURE_SIDE))
    plain = {
        "name": visible(name),
        "token": token,
        "width": width,
        "height": height,
        "image": picture_uri(picture, "JPEG", quality=90),
        "mask": base64.b64encode(zlib.compress(mask.tobytes())).decode(),
        "categories": [
            {"index": c.index, "name": c.name, "color": list(c.color)} for c in categories
        ],
        "note": note,
    }
    return fill("editor.html", plain, "editor_mask.js", "editor.js")
