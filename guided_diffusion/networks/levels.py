"""Levels of a U-Net: their widths, the image sizes that they divide, which have attention."""

import math
from collections.abc import Sequence

from guided_diffusion.runtime.errors import UserError

_WIDEST = 1000


def default_channel_mult(image_size: int) -> tuple[float, ...]:
    """Widths of the levels in arXiv 2105.05233, of its image size that is nearest as a ratio."""
    known = {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
        32: (1, 2, 2, 2),
    }
    return known[min(known, key=lambda size: abs(math.log(size / image_size)))]


def parse_channel_mult(text: str | Sequence[float]) -> tuple[float, ...]:
    """`"0.5,1,2"` to `(0.5, 1, 2)`; empty for "", the default."""
    parts = text.split(",") if isinstance(text, str) else text
    try:
        values = tuple(float(part) for part in parts if str(part).strip())
    except ValueError:
        raise UserError(f"--channel_mult {text}: expected numbers like 0.5,1,2") from None
    if not all(0 < value <= _WIDEST for value in values):
        raise UserError(f"--channel_mult {text}: widths must be above zero, at most {_WIDEST}")
    return tuple(int(value) if value == int(value) else value for value in values)


def check_size(image_size: int, levels: int) -> None:
    """:raises UserError: for a size that cannot be halved `levels - 1` times."""
    multiple = 2 ** (levels - 1)
    if image_size < 1 or image_size % multiple:
        below = max(image_size // multiple, 1) * multiple
        raise UserError(
            f"--image_size {image_size}: a network of {levels} levels needs a multiple of"
            f" {multiple}, such as {below} or {below + multiple}; or give fewer levels with"
            " --channel_mult"
        )


def attention_factors(resolutions: str, image_size: int, levels: int) -> tuple[int, ...]:
    """Feature maps with self-attention, as factors of downsampling from the image.

    A size that the network does not have, such as 32 in one of 224 pixels (224, 112, 56, 28, ...),
    stands for the nearest that it has; sizes out of its range are ignored, as in the original.

    :param resolutions: sizes of the feature maps, pixels, such as "32,16,8".
    """
    try:
        sizes = [int(part) for part in str(resolutions).split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"--attention_resolutions {resolutions}: expected sizes like 32,16,8"
        ) from None
    factors = []
    for size in sizes:
        if size < 1:
            raise UserError(f"--attention_resolutions {resolutions}: sizes must be above zero")
        level = round(math.log2(image_size / size))
        if 0 <= level < levels and 2**level not in factors:
            factors.append(2**level)
    return tuple(factors)
