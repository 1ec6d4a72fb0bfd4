"""Reading and writing masks: the class of each pixel, or foreground and background."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, TiffImagePlugin

from guided_diffusion.images.decoded import Undecodable
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import (
    MAX_PIXELS,
    ImageError,
    equal_channels,
    image_errors,
    open_image,
    save_picture,
)
from guided_diffusion.runtime.errors import UserError

LOSSLESS_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp")
_CONVERT = "onvert it with tools/prepare_data.py --action validate --fix-issues."
BLACK_AND_WHITE = f"A black-and-white mask? C{_CONVERT}"
BINARY = f"A black-and-white mask? Pass --binary True, or c{_CONVERT}"  # of commands that have it
_SCALED = (
    "Grey levels for display? Convert them to indices with tools/rgb2tif.py and a class table that"
    " lists them as colours."
)
BINARY_HELP = "two classes: masks are black and white, or every class but 0 is foreground"
NEAR = 48  # grey levels of 255 from black or white that still count as black or white
GREY_EDGES = 0.4  # share of a blurred black-and-white mask that may be grey
# Share of the noise of lossy files and of grey edges that may lie in 2 x 2 blocks of one value.
# Measured on discs, lines and rectangles as JPEG of quality 10 to 100: at most 0.08; drawn: 0.9.
_SOLID_NOISE, _SOLID_GREY = 0.25, 0.1
# Values of a radiograph at least, and the share of its pixels in 2 x 2 blocks of one value at most.
# Measured: chest X-rays at most 0.24, phantoms 0.04; their masks at least 0.88.
_SHADES, _FLAT = 32, 0.6


@dataclass(frozen=True)
class MaskRule:
    """What the values in mask files mean.

    classes    the values are class indices, 0 to `classes` - 1; None: any below 255
    ignore     values of pixels without a label, which are read as IGNORE
    binary     masks separate foreground (1) from background (0): they are black and white, or
               hold class indices, of which all but 0 are foreground
    threshold  with `binary`, the grey level (0 to 255) above which a pixel is foreground; None:
               half of white, for class indices 0
    """

    classes: int | None = None
    ignore: tuple[int, ...] = ()
    binary: bool = False
    threshold: int | None = None

    def read(self, path: str) -> np.ndarray:
        """Read a mask file, uint8 [H x W], IGNORE where pixels have no label.

        :raises ImageError: if the file is unreadable or its values do not fit the rule.
        """
        if not self.binary:
            return _read_indices(path, self.classes, self.ignore, BINARY)
        values, lossy = mask_values(path)
        labelled = ~np.isin(values, self.ignore)
        shown = np.where(labelled, values, 0)
        if self.threshold is not None:
            foreground: np.ndarray | None = grey_levels(shown) > self.threshold
        else:
            foreground = _foreground(shown, lossy)
        if foreground is None:
            raise ImageError(
                f"{path} holds the values {list_values(shown)}: neither black and white nor class"
                f" indices. {_advice(shown, lossy, None)}"
            )
        return np.where(labelled, foreground, IGNORE).astype(np.uint8)


def read_mask(
    path: str, num_classes: int | None = None, ignore: tuple[int, ...] = ()
) -> np.ndarray:
    """Read class indices, uint8 [H x W]: of a palette file its indices, of others its grey values.

    :param ignore: values of pixels without a label; they are read as IGNORE.
    :raises ImageError: if the file is unreadable, is drawn in colours, stores its values with
        loss, or holds others than `ignore` and 0 to `num_classes` - 1 (by default 255).
    """
    return _read_indices(path, 256 if num_classes is None else num_classes, ignore, BLACK_AND_WHITE)


def _read_indices(
    path: str, num_classes: int | None, ignore: tuple[int, ...], black_and_white_advice: str
) -> np.ndarray:
    """`read_mask`, in which None classes allow any value but IGNORE."""
    values, lossy = mask_values(path)
    labelled = values if not ignore else values[~np.isin(values, ignore)]
    top = IGNORE if num_classes is None else num_classes
    if labelled.size and (labelled.min() < 0 or labelled.max() >= top):
        worst = labelled.min() if labelled.min() < 0 else labelled.max()
        what = (
            f"the value {worst}, not a class."
            if num_classes is None
            else f"the values {list_values(labelled)}; {top} classes allow 0 to {top - 1}."
        )
        advice = _advice(labelled, lossy, top) or black_and_white_advice
        raise ImageError(f"{path} holds {what} {advice}")
    if lossy and values.min() < values.max():
        raise ImageError(f"{path} cannot be trusted as class indices: {_lossy_advice(lossy)}")
    if ignore:
        values = np.where(np.isin(values, ignore), IGNORE, values)
    return values.astype(np.uint8)


def mask_values(path: str) -> tuple[np.ndarray, str]:
    """A mask's values as stored, integers [H x W], and the lossy compression of the file or "".

    :raises ImageError: if the file is unreadable, drawn in colours, or holds fractions.
    """
    with image_errors(path):
        mask, lossy = _decode_values(path)
        if mask.ndim == 3:
            if not equal_channels(mask):
                raise ImageError(
                    f"{path} is a colour mask; masks hold class indices. Convert it with "
                    "tools/rgb2tif.py"
                )
            mask = mask[..., 0]
        if mask.size == 0:
            raise Undecodable("it has no pixels")
        if mask.dtype.kind == "f":
            if not np.array_equal(mask, np.rint(mask)) or np.abs(mask).max() >= 2**31:
                raise Undecodable("it holds fractions; masks hold class indices")
            mask = mask.astype(np.int64)
        return mask, lossy


def black_and_white(values: np.ndarray, lossy: str) -> np.ndarray | None:
    """The white pixels, bool [H x W], of a mask that is surely drawn in black and white.

    Its edges may be grey, from interpolation, or noisy, from lossy compression; anything else,
    such as class indices beside a border of 255, makes it None.
    """
    levels = grey_levels(values)
    if levels.min() < 0 or levels.max() < 255 - NEAR:
        return None
    dark, bright = (levels > 0) & (levels <= NEAR), (levels >= 255 - NEAR) & (levels < 255)
    grey = (levels > NEAR) & (levels < 255 - NEAR)
    if not dark.any() and not bright.any() and not grey.any():
        return levels > 0
    if not lossy and not bright.any() and not grey.any():
        return None  # class indices, drawn thinly
    if lossy:  # the noise of strong compression has flat parts, but stays in blocks with an edge
        near = _near_white(levels)
        return levels > 127 if near[dark].all() and grey.mean() <= GREY_EDGES else None
    solid = in_block(levels)
    shares = ((dark, _SOLID_NOISE), (bright, _SOLID_NOISE), (grey, _SOLID_GREY))
    confined = all(
        np.count_nonzero(s & solid) <= share * np.count_nonzero(s) for s, share in shares
    )
    return levels > 127 if confined and grey.mean() <= GREY_EDGES else None


def _near_white(levels: np.ndarray, block: int = 16) -> np.ndarray:
    """Pixels in a square block that shows white, or beside one, bool [H x W]."""
    height, width = levels.shape
    white = np.pad(levels > 127, ((0, -height % block), (0, -width % block)))
    shown = white.reshape(len(white) // block, block, -1, block).any(axis=(1, 3))
    beside = sliding_window_view(np.pad(shown, 1), (3, 3)).any(axis=(2, 3))
    return beside.repeat(block, 0).repeat(block, 1)[:height, :width]


def resembles_radiograph(path: str) -> bool:
    """Whether a file holds shades as a radiograph does: many, and hardly two neighbours alike.

    Masks are areas of few values. Lossy compression makes both alike, so of its files it is False.
    """
    try:
        values, lossy = mask_values(path)
    except ImageError:
        return False  # reading it as a mask says why
    return not lossy and len(np.unique(values)) >= _SHADES and bool(in_block(values).mean() < _FLAT)


def grey_levels(values: np.ndarray) -> np.ndarray:
    """Values of up to 16 bits as levels of 255; what exceeds 16 bits is left as it is."""
    return values / 257 if 255 < values.max() <= 65535 else values


def in_block(mask: np.ndarray) -> np.ndarray:
    """Pixels in a 2 x 2 block of one value, bool [H x W]."""
    corner = mask[:-1, :-1]
    block = (corner == mask[1:, 1:]) & (corner == mask[1:, :-1]) & (corner == mask[:-1, 1:])
    block = np.pad(block, 1)
    return block[1:, 1:] | block[1:, :-1] | block[:-1, 1:] | block[:-1, :-1]


def ignored_values(ignore_index: int) -> tuple[int, ...]:
    """The values that `--ignore_index` names: itself, or none for -1.

    :raises UserError: if no mask can hold it.
    """
    if not -1 <= ignore_index <= IGNORE:
        raise UserError(
            f"--ignore_index {ignore_index}: expected a value of mask pixels, 0 to {IGNORE}, or -1"
        )
    return (ignore_index,) if ignore_index >= 0 else ()


def count_classes(values: Iterable[int], flag: str) -> int:
    """One more than the highest value in a set of masks, at least 2.

    :param flag: with which the user can state the number.
    :raises UserError: if most values up to the highest are in no mask: they are not class indices.
    """
    seen = sorted({int(value) for value in values} - {IGNORE})
    highest = max(seen, default=0)
    if has_gaps(seen):
        advice = BINARY if len({0, *seen}) == 2 else _SCALED
        absent = highest + 1 - len({0, *seen})
        shown = ", ".join(map(str, seen[:12])) + (", ..." if seen[12:] else "")
        raise UserError(
            f"the masks hold the values {{{shown}}}, which would be {highest + 1} classes, {absent}"
            f" of them in no mask. {advice} If they are class indices, pass"
            f" {flag} {highest + 1}"
        )
    return max(2, highest + 1)


def has_gaps(values: Iterable[int]) -> bool:
    """Whether most values from 1 to the highest are missing, so that they are hardly indices."""
    classes = {*values} - {0, IGNORE}
    return max(classes, default=0) > 2 * len(classes)


def check_sizes(mask_path: str, mask: np.ndarray, path: str, image: np.ndarray) -> None:
    """Compare a mask with its radiograph, both `[H x W ...]`.

    :raises ImageError: if they differ in size.
    """
    if mask.shape[:2] != image.shape[:2]:
        sizes = ["x".join(map(str, shape[:2])) for shape in (mask.shape, image.shape)]
        raise ImageError(
            f"{mask_path} has {sizes[0]} pixels (height x width), its radiograph {path}"
            f" {sizes[1]}; they must not differ in size: export the mask at the radiograph's own"
            " size"
        )


def write_mask(path: str, mask: np.ndarray) -> None:
    """Write class indices uint8 [H x W] losslessly as grey values, atomically."""
    if os.path.splitext(path)[1].lower() not in LOSSLESS_EXTENSIONS:
        raise ImageError(
            f"{path} would not keep class indices exactly; masks are written as "
            f"{', '.join(LOSSLESS_EXTENSIONS)}"
        )
    save_picture(path, Image.fromarray(mask.astype(np.uint8)))


def list_values(values: np.ndarray) -> str:
    """The values of a mask for a message, `{0, 1, 2}`."""
    distinct = np.unique(values).tolist()
    return "{" + ", ".join(map(str, distinct[:12])) + (", ...}" if distinct[12:] else "}")


def _foreground(values: np.ndarray, lossy: str) -> np.ndarray | None:
    distinct = np.unique(values)
    if lossy:
        return values > 0 if distinct[-1] == 0 else black_and_white(values, lossy)
    if distinct[-1] <= NEAR or (len(distinct) <= 2 and distinct[0] == 0):
        return values > 0
    white = black_and_white(values, lossy)
    if white is None and distinct[-1] < 255 - NEAR:
        return values > 0
    return white


def _advice(values: np.ndarray, lossy: str, top: int | None) -> str:
    """What to do about values that do not fit; "" if they are black and white."""
    distinct = np.unique(values)
    if lossy:
        white = None if top is None else black_and_white(values, lossy)
        return _lossy_advice(lossy) if white is None else ""
    if len(distinct) <= 2 and top is not None:
        return ""
    if len(distinct) > 2 and has_gaps(distinct.tolist()):
        return _SCALED
    if distinct[-1] == IGNORE and (top is None or distinct[-2] < top):
        return f"If {IGNORE} marks pixels to ignore, pass --ignore_index {IGNORE}."
    return "Correct the number of classes or the mask."


def _lossy_advice(lossy: str) -> str:
    return f"{lossy} alters values; save masks as PNG or TIFF."


def _decode_values(path: str) -> tuple[np.ndarray, str]:
    """A file's values as stored, [H x W] or [H x W x 3], and its lossy compression or ""."""
    picture = open_image(path)
    if isinstance(picture, bytes):
        from guided_diffusion.images import dicom_io  # and with it pydicom, for DICOM only

        return dicom_io.read_dicom_mask(picture, MAX_PIXELS)
    lossy = str(picture.info.get("lossy", ""))
    if lossy:
        colours = np.asarray(picture.convert("RGB"))
        coloured = np.ptp(colours.astype(np.int16), axis=2).max() > NEAR
        return (colours if coloured else np.asarray(picture.convert("L"))), lossy
    if (deep := picture.info.get("deep")) is not None:
        if deep.shape[-1] != 3 and deep[..., -1].min() < 65535:
            raise Undecodable("it has transparent pixels; save the mask without transparency")
        return deep[..., 0] if deep.shape[-1] == 2 else deep[..., :3], ""
    if picture.mode == "P":
        return _palette_values(picture), ""
    if picture.mode in ("1", "L"):
        return np.asarray(picture) // picture.info.get("grey_step", 1), ""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        if getattr(picture, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            values = (2 ** (8 * values.dtype.itemsize) - 1) - values  # as in 8 bits, black is 0
        return values, ""
    if "A" in picture.getbands() and np.asarray(picture.getchannel("A")).min() < 255:
        raise Undecodable("it has transparent pixels; save the mask without transparency")
    return np.asarray(picture.convert("L" if picture.mode in ("LA", "La") else "RGB")), ""


def _palette_values(picture: Image.Image) -> np.ndarray:
    """The indices of a palette file, or its grey levels where those are what was meant.

    Optimisers and GIF turn grey values into palettes of these greys; quantising black and white
    may put white first. A palette that displays class indices has colours, or rising greys.
    """
    indices = np.asarray(picture)
    used = np.unique(indices)
    palette = np.zeros((256, 3), np.uint8)
    stored = np.reshape(picture.getpalette("RGB") or [], (-1, 3))
    palette[: len(stored)] = stored
    colours = palette[used]
    if equal_channels(colours):
        greys = colours[:, 0].astype(int)
        rising = bool((np.diff(greys) > 0).all())
        if picture.format == "GIF" or (rising and greys[-1] <= NEAR):
            return palette[indices, 0]
        if rising:
            return indices
        if set(greys.tolist()) <= {0, 255}:
            return palette[indices, 0]
        raise Undecodable(
            "the greys of its palette do not rise with the index, so that class indices and grey"
            " values differ; save the mask as grey values"
        )
    black = [int(i) for i in used if 0 < i < IGNORE and not palette[i].any()]
    if black and palette[0].any() and used[0] == 0:
        raise Undecodable(
            f"its palette shows index {black[0]} in black and index 0 in colour, so that the"
            " indices are hardly classes; convert it by its colours with tools/rgb2tif.py, or save"
            " the mask as grey values"
        )
    return indices
