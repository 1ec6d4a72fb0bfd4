"""Reading and writing masks: the class of each pixel."""

import os

import numpy as np
from PIL import Image

from guided_diffusion.images import dicom_io
from guided_diffusion.images.image_io import (
    MAX_PIXELS,
    ImageError,
    equal_channels,
    image_errors,
    open_image,
    save_picture,
)

LOSSLESS_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp")


def read_mask(path: str, num_classes: int | None = None) -> np.ndarray:
    """Read class indices, uint8 [H x W]: of a palette file its indices, of others its grey values.

    :raises ImageError: if the file is unreadable, is drawn in colours, or holds values outside 0 to
        `num_classes` - 1 (by default 255).
    """
    with image_errors(path):
        mask = _decode_indices(path)
        if mask.ndim == 3:
            if not equal_channels(mask):
                raise ImageError(
                    f"{path} is a colour mask; masks hold class indices. Convert it with "
                    "tools/rgb2tif.py"
                )
            mask = mask[..., 0]
        if mask.size == 0:
            raise ValueError("it has no pixels")
        if mask.dtype.kind == "f" and not np.array_equal(mask, np.rint(mask)):
            raise ValueError("it holds fractions; masks hold class indices")
        top = 256 if num_classes is None else num_classes
        if mask.min() < 0 or mask.max() >= top:
            raise ImageError(_outside_classes(path, mask, top))
        return mask.astype(np.uint8)


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


def _decode_indices(path: str) -> np.ndarray:
    """A file's values as stored, [H x W] or [H x W x 3]."""
    picture = open_image(path)
    if isinstance(picture, bytes):
        return dicom_io.read_dicom_stored(picture, MAX_PIXELS)
    if picture.format == "GIF" and picture.mode == "P":
        # GIF has no grey mode: where the colours are grey, they are what was meant
        colours = np.asarray(picture.convert("RGB"))
        return colours if equal_channels(colours) else np.asarray(picture)
    if picture.mode in ("P", "1", "L", "I", "F") or picture.mode.startswith("I;16"):
        return np.asarray(picture)
    if "A" in picture.getbands() and np.asarray(picture.getchannel("A")).min() < 255:
        raise ValueError("it has transparent pixels; save the mask without transparency")
    return np.asarray(picture.convert("L" if picture.mode in ("LA", "La") else "RGB"))


def _outside_classes(path: str, mask: np.ndarray, num_classes: int) -> str:
    values = np.unique(mask).tolist()
    shown = ", ".join(f"{value:g}" for value in values[:12]) + (", ..." if values[12:] else "")
    message = f"{path} holds the values {{{shown}}}; {num_classes} classes allow 0 to "
    message += f"{num_classes - 1}. "
    if len(values) <= 2:
        return message + (
            "A black-and-white mask? Convert it with tools/prepare_data.py --action validate "
            "--fix-issues."
        )
    if os.path.splitext(path)[1].lower() in (".jpg", ".jpeg"):
        return message + "JPEG alters values; save masks as PNG or TIFF."
    return message + "Correct the number of classes or the mask."
