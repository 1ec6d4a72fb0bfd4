"""Sampled images as pictures to look at: grids with captions, and animations."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.runtime.files import write_atomically

# images narrower than this are enlarged, pixel by pixel, so that captions have room
_MIN_WIDTH = 64
_FONT_SIZE = 10
_CAPTION_HEIGHT = 14
_GAP = 2


def labelled_grid(
    images: np.ndarray, captions: Sequence[str], columns: int | None = None
) -> np.ndarray:
    """Images in rows, each with a line of text below: uint8 `[H' x W']` or `[H' x W' x 3]`.

    :param images: uint8 `[N x H x W x C]`.
    :param captions: N texts; what does not fit is cut off.
    :param columns: images a row; about as many as rows unless told.
    """
    factor = math.ceil(_MIN_WIDTH / images.shape[2])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cell = (width + _GAP, height + _CAPTION_HEIGHT)
    canvas = Image.new("L" if channels == 1 else "RGB", (columns * cell[0], rows * cell[1]))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, (image, caption) in enumerate(zip(images, captions)):
        x, y = number % columns * cell[0], number // columns * cell[1]
        canvas.paste(Image.fromarray(image[..., 0] if channels == 1 else image), (x, y))
        while caption and font.getlength(caption) > width:
            caption = caption[:-1]
        draw.text((x + 1, y + height + 1), caption, "white", font)
    return np.asarray(canvas)


def write_gif(path: str, frames: Sequence[np.ndarray], seconds: float = 0.25) -> None:
    """Write pictures of one size as an animation that dwells on the last; for ever in a loop."""
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [2000]
    encoded = io.BytesIO()
    pictures[0].save(
        encoded, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    write_atomically(path, lambda file: file.write(encoded.getvalue()))
