"""Colour masks, whose colours stand for classes, to masks of class indices."""

from collections.abc import Sequence

import numpy as np

from guided_diffusion.images.image_io import ImageError, read_image
from guided_diffusion.images.masks import in_block
from guided_diffusion.segmentation.categories import Category, ClassTable

Color = tuple[int, int, int]


def read_color_mask(path: str) -> np.ndarray:
    """A mask's colours, uint8 [H x W x 3]. Transparent pixels are black."""
    colors = read_image(path)
    if colors.dtype == np.uint8:
        return colors if colors.ndim == 3 else np.repeat(colors[..., None], 3, axis=2)
    levels = np.rint(255 * colors)  # exact where 8 bits were widened to 16
    if colors.ndim == 2 or np.abs(255 * colors - levels).max() > 1e-3:
        raise ImageError(f"{path} has more than 8 bits per channel; colour masks have 8")
    return levels.astype(np.uint8)


def unknown_colors(colors: np.ndarray, categories: Sequence[Category]) -> dict[Color, int]:
    """Colours that are no class's and how many pixels have them, the most frequent first."""
    found, counts = np.unique(_packed(colors), return_counts=True)
    strange = ~np.isin(found, _packed_table(categories))
    order = np.argsort(-counts[strange], kind="stable")
    codes, counts = found[strange][order], counts[strange][order]
    return {_unpacked(code): int(count) for code, count in zip(codes.tolist(), counts)}


def solid_share(colors: np.ndarray, categories: Sequence[Category]) -> float:
    """Share of the pixels in colours of no class that fill a 2 x 2 block, as drawn areas do."""
    strange = ~np.isin(_packed(colors), _packed_table(categories))
    return float(in_block(_packed(colors))[strange].mean()) if strange.any() else 0.0


def indices_from_colors(
    colors: np.ndarray, table: ClassTable, unknown: str = "nearest"
) -> np.ndarray:
    """Class indices uint8 [H x W] of a colour mask uint8 [H x W x 3].

    :param unknown: what becomes of a colour of no class: "nearest" takes the class whose colour is
        nearest in RGB (the lower index of two), "background" takes class 0, "ignore" the value
        that the table ignores.
    """
    found, inverse = np.unique(_packed(colors), return_inverse=True)
    values = np.array([category.index for category in table.entries], np.uint8)
    if unknown == "nearest":
        indices = np.zeros(len(found), np.uint8)
        known = np.array([category.color for category in table.entries], np.int32)
        rgb = np.array([_unpacked(code) for code in found.tolist()], np.int32)
        for start in range(0, len(rgb), 65536):  # a photograph has millions of colours
            part = rgb[start : start + 65536, None]
            nearest = ((part - known) ** 2).sum(axis=2).argmin(axis=1)
            indices[start : start + 65536] = values[nearest]
    else:
        rest = table.ignored[0].index if unknown == "ignore" else 0
        indices = np.full(len(found), rest, np.uint8)
        for value, code in zip(values, _packed_table(table.entries)):
            indices[found == code] = value
    return indices[inverse].reshape(colors.shape[:2])


def _packed(colors: np.ndarray) -> np.ndarray:
    red, green, blue = (colors[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue


def _packed_table(categories: Sequence[Category]) -> np.ndarray:
    return _packed(np.array([category.color for category in categories]))


def _unpacked(code: int) -> Color:
    return code >> 16, code >> 8 & 255, code & 255
