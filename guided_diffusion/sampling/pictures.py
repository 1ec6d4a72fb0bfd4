"""Image grids, with or without captions, and animations."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.runtime.storage.files import write_atomically

# with captions, narrower images are enlarged by an integer factor to fit the text
_MIN_WIDTH = 64
_FONT_SIZE = 10
_CAPTION_HEIGHT = 14
_GAP = 2


def image_grid(
    images: np.ndarray, captions: Sequence[str] = (), columns: int | None = None
) -> np.ndarray:
    """Tile images on a black canvas: uint8 `[H' x W']` or `[H' x W' x 3]`.

    :param images: uint8 `[N x H x W x C]`.
    :param captions: N captions, drawn below the images and cut to their width; () for none.
    :param columns: images per row; None makes the grid about square.
    """
    if captions:
        factor = math.ceil(_MIN_WIDTH / images.shape[2])
        images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    # captions separate the rows; without them a gap goes around every image
    margin, below = (0, _CAPTION_HEIGHT) if captions else (_GAP, _GAP)
    cell = (width + _GAP, height + below)
    size = (columns * cell[0] + margin, rows * cell[1] + margin)
    canvas = Image.new("L" if channels == 1 else "RGB", size)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, image in enumerate(images):
        x, y = number % columns * cell[0] + margin, number // columns * cell[1] + margin
        canvas.paste(Image.fromarray(image[..., 0] if channels == 1 else image), (x, y))
        caption = captions[number] if captions else ""
        while caption and font.getlength(caption) > width:
            caption = caption[:-1]
        draw.text((x + 1, y + height + 1), caption, "white", font)
    return np.asarray(canvas)


def write_gif(path: str, frames: Sequence[np.ndarray], seconds: float = 0.25) -> None:
    """Write frames of equal size as a looping GIF that holds the last frame for 2 s.

    :param seconds: duration of each of the other frames.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [2000]
    encoded = io.BytesIO()
    pictures[0].save(
        encoded, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    write_atomically(path, lambda file: file.write(encoded.getvalue()))
