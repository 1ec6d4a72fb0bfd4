"""Resizing images to the network's size, and mapping results back exactly.

Along an axis, N source pixels are laid over n result pixels so that their centres agree: result
pixel i shows source pixel floor((i + 1/2) N / n). The same formula with N and n exchanged leads
back: what was shown is found again exactly, whether the axis was stretched or shrunk.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from guided_diffusion.runtime.errors import UserError

IGNORE = 255
"""The value of mask pixels that losses and metrics ignore."""

KINDS = ("crop", "pad", "squash", "native")

# An image one pixel wide, scaled until its short side fits, is enormous along its long side. Above
# this many pixels only the part that is kept is computed.
_LARGEST_SCALED = 2**26


def _nearest(from_length: int, to_length: int) -> np.ndarray:
    """Source index of each result pixel, in integer arithmetic: int64 [to_length]."""
    return (2 * np.arange(to_length, dtype=np.int64) + 1) * from_length // (2 * to_length)


@dataclass(frozen=True)
class _Axis:
    """One axis: `length` source pixels scaled to `scaled`, then cut or padded to `result`.

    Result pixel k shows scaled pixel k + offset; the offset is negative where there is padding.
    """

    length: int
    scaled: int
    result: int

    @property
    def offset(self) -> int:
        if self.scaled >= self.result:
            return (self.scaled - self.result) // 2
        return -((self.result - self.scaled) // 2)

    @property
    def inside(self) -> slice:
        """The result pixels that show the image rather than padding."""
        start = max(0, -self.offset)
        return slice(start, start + min(self.scaled, self.result))

    def forward(self) -> np.ndarray:
        """Source index shown by each result pixel of `inside`."""
        start = max(0, self.offset)
        return _nearest(self.length, self.scaled)[start : start + min(self.scaled, self.result)]

    def backward(self) -> tuple[slice, np.ndarray]:
        """The source pixels that the result shows, and the result index of each."""
        wanted = _nearest(self.scaled, self.length)
        first = max(0, self.offset)
        last = first + min(self.scaled, self.result) - 1
        found = wanted.clip(first, last)
        # a stretched pixel may reach into the crop although its centre is outside
        known = (found == wanted) | (
            (2 * found + 1) * self.length // (2 * self.scaled) == np.arange(self.length)
        )
        where = np.flatnonzero(known)
        return slice(where[0], where[-1] + 1), found[where] - self.offset

    def backward_linear(self) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
        """As `backward`, with two result indices to interpolate and the weight of the second."""
        known, _ = self.backward()
        place = (np.arange(known.start, known.stop) + 0.5) * self.scaled / self.length - 0.5
        place = (place - self.offset).clip(self.inside.start, self.inside.stop - 1)
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, self.inside.stop - 1)
        return known, low, high, (place - low).astype(np.float32)


@dataclass(frozen=True)
class Geometry:
    """How an image of any size is mapped to `size`, and back.

    - `crop`: scale until both sides are covered, keep the centre, as guided-diffusion does.
    - `pad`: scale until the whole image fits, centre it, pad with black (masks: IGNORE).
    - `squash`: scale each side independently.
    - `native`: keep the image as it is; the predictor slides a window over it.

    :param kind: one of these.
    :param size: side of a square, or (height, width), in pixels; not used by `native`.
    :raises UserError: another kind, or a size below one pixel.
    """

    kind: str = "crop"
    size: int | tuple[int, int] = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"resize {self.kind!r} must be one of {', '.join(KINDS)}")
        if min(self.height_width) < 1:
            raise UserError(f"size {self.size} must be at least 1 pixel")

    @property
    def height_width(self) -> tuple[int, int]:
        """`size` as (height, width)."""
        if isinstance(self.size, int | np.integer):
            return int(self.size), int(self.size)
        height, width = self.size
        return int(height), int(width)

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this height and width is mapped to."""
        return (height, width) if self.kind == "native" else self.height_width

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize [H x W] or [H x W x 3], uint8 or float32 in [0, 1]: bicubic."""
        if self.kind == "native":
            return image
        return _resample(image, self._plan(image.shape))

    def scaled_image(self, image: np.ndarray) -> np.ndarray:
        """As `apply_image`, without the cropping or padding."""
        if self.kind == "native":
            return image
        plan = self._plan(image.shape)
        return _resample(image, plan._replace(result=plan.scaled))

    def scaled_mask(self, mask: np.ndarray) -> np.ndarray:
        """As `apply_mask`, without the cropping or padding."""
        if self.kind == "native":
            return mask
        return mask[np.ix_(*map(_nearest, mask.shape, self._plan(mask.shape).scaled))]

    def apply_mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize class indices uint8 [H x W]: nearest neighbour, padding is IGNORE."""
        if self.kind == "native":
            return mask
        rows, columns = self._plan(mask.shape).axes(mask.shape)
        result = np.full(self.height_width, IGNORE, dtype=mask.dtype)
        result[rows.inside, columns.inside] = mask[np.ix_(rows.forward(), columns.forward())]
        return result

    def invert_mask(self, mask: np.ndarray, size: tuple[int, int], outside: int = 0) -> np.ndarray:
        """Map class indices [h x w] back to [H x W], nearest neighbour.

        :param size: (H, W) of the original image.
        :param outside: the class of pixels that a crop removed.
        """
        if self.kind == "native":
            return mask
        rows, columns = self._plan(size).axes(size)
        (known_rows, y), (known_columns, x) = rows.backward(), columns.backward()
        result = np.full(size, outside, dtype=mask.dtype)
        result[known_rows, known_columns] = mask[np.ix_(y, x)]
        return result

    def invert_probabilities(self, probabilities: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Map float32 [C x h x w] back to [C x H x W], bilinear; padding does not contribute.

        Class 0 has probability 1 where a crop removed pixels.

        :param size: (H, W) of the original image.
        """
        if self.kind == "native":
            return probabilities
        rows, columns = self._plan(size).axes(size)
        known_rows, y0, y1, wy = rows.backward_linear()
        known_columns, x0, x1, wx = columns.backward_linear()
        result = np.zeros((len(probabilities), *size), dtype=np.float32)
        result[0] = 1.0
        for source, target in zip(probabilities, result):  # one class at a time, to save memory
            strip = source[y0] * (1 - wy)[:, None] + source[y1] * wy[:, None]
            target[known_rows, known_columns] = strip[:, x0] * (1 - wx) + strip[:, x1] * wx
        return result

    def _plan(self, size: tuple[int, ...]) -> "_Plan":
        """How to resize an image of `size` = (height, width, ...).

        Halving first and interpolating last is guided-diffusion's order. Sizes are rounded down at
        each halving, so the scaled size must be followed through them to agree to the pixel.
        """
        height, width = size[:2]
        h, w = target = self.height_width
        if self.kind == "pad":
            scale = min(h / height, w / width)
            target = (
                min(h, max(1, round(height * scale))),
                min(w, max(1, round(width * scale))),
            )
        halvings = []
        while height >= 2 * target[0] and width >= 2 * target[1]:
            height, width = height // 2, width // 2
            halvings.append((height, width))
        if self.kind == "crop":
            scale = max(h / height, w / width)
            target = max(h, round(height * scale)), max(w, round(width * scale))
        return _Plan(halvings, target, (h, w))


class _Plan(NamedTuple):
    """Sizes (height, width) after each halving, of the whole image once scaled, of the result."""

    halvings: list[tuple[int, int]]
    scaled: tuple[int, int]
    result: tuple[int, int]

    def axes(self, size: tuple[int, ...]) -> tuple[_Axis, _Axis]:
        """Rows and columns, from an image of `size` = (height, width, ...)."""
        rows, columns = (_Axis(*sides) for sides in zip(size, self.scaled, self.result))
        return rows, columns


def _resample(image: np.ndarray, plan: _Plan) -> np.ndarray:
    """`_fit` for arrays, uint8 or float32 in [0, 1]."""
    if image.dtype == np.uint8:
        return _fit(Image.fromarray(image), plan)
    # Pillow resizes float images one channel at a time
    planes = [
        _fit(Image.fromarray(plane.astype(np.float32)), plan)
        for plane in np.atleast_3d(image).transpose(2, 0, 1)
    ]
    # bicubic weights overshoot at edges; 8-bit images saturate, these must be clipped
    return (planes[0] if image.ndim == 2 else np.stack(planes, axis=-1)).clip(0.0, 1.0)


def _fit(picture: Image.Image, plan: _Plan) -> np.ndarray:
    """Scale a picture as planned, crop what is too much, pad with zeros what is missing."""
    for height, width in plan.halvings:
        picture = picture.resize((width, height), Image.Resampling.BOX)
    height, width = picture.size[::-1]
    scaled, result = plan.scaled, plan.result
    rows, columns = plan.axes((height, width))
    top, left = max(0, rows.offset), max(0, columns.offset)
    shown = (min(scaled[0], result[0]), min(scaled[1], result[1]))
    if scaled[0] * scaled[1] > _LARGEST_SCALED:
        zoom_y, zoom_x = height / scaled[0], width / scaled[1]
        box = (
            left * zoom_x,
            top * zoom_y,
            min(width, (left + shown[1]) * zoom_x),
            min(height, (top + shown[0]) * zoom_y),
        )
        array = np.asarray(picture.resize(shown[::-1], Image.Resampling.BICUBIC, box=box))
    else:
        array = np.asarray(picture.resize(scaled[::-1], Image.Resampling.BICUBIC))
        array = array[top : top + shown[0], left : left + shown[1]]
    if shown == result:
        return array
    padded = np.zeros((*result, *array.shape[2:]), dtype=array.dtype)
    padded[rows.inside, columns.inside] = array
    return padded
