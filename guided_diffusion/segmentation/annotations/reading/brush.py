"""The run lengths of Label Studio's brush: bits that hold the four channels of an RGBA picture.

32 bits  number of values
5 bits   bits of a value, less one
4 x 4    bits of a run's length, less one, for each of four classes of lengths
runs     1 bit: whether one value is repeated; 2 bits: the class; the length, less one; then the
         value, or as many values as the run is long
"""

import numpy as np

from guided_diffusion.segmentation.annotations.reading.node import Node
from guided_diffusion.segmentation.annotations.reading.source import Size

_OPAQUE = 128  # alpha from which a pixel counts as painted: covered by half


def painted(rle: Node, size: Size) -> np.ndarray:
    """The pixels that the brush painted, bool [H x W].

    :param rle: a list of bytes.
    :param size: of the image when it was painted.
    :raises UserError: if the bytes are damaged or belong to another size.
    """
    try:
        values = _unpacked(rle.whole_numbers(255).astype(np.uint8), 4 * size[0] * size[1])
    except ValueError as error:
        height, width = size
        raise rle.fail(f"the brush's run lengths of {height} x {width} pixels: {error}") from error
    return values.reshape(*size, 4)[..., 3] >= _OPAQUE


def _unpacked(content: np.ndarray, expected: int) -> np.ndarray:
    """The values, uint8 [N].

    :raises ValueError: if there are not as many as expected, or bits are missing.
    """
    bits = np.unpackbits(content)
    place = 0

    def number(length: int) -> int:
        nonlocal place
        part = bits[place : place + length]
        if len(part) < length:
            raise ValueError("bits are missing")
        place += length
        return int("".join(map(str, part)), 2)

    count, depth = number(32), number(5) + 1
    if count != expected:
        raise ValueError(f"they are {count} values, not {expected}")
    if depth != 8:
        raise ValueError(f"they have {depth} bits, not 8")
    lengths = [number(4) + 1 for _ in range(4)]
    values = np.zeros(count, np.uint8)
    done = 0
    while done < count:
        repeated = number(1)
        run = number(lengths[number(2)]) + 1
        if run > count - done:
            raise ValueError("a run is too long")
        if repeated:
            values[done : done + run] = number(depth)
        else:
            part = bits[place : place + run * depth]
            if len(part) < run * depth:
                raise ValueError("bits are missing")
            values[done : done + run] = np.packbits(part)
            place += run * depth
        done += run
    return values
