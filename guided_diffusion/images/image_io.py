"""Reading and writing images: PNG, JPEG, BMP, GIF, WebP, TIFF (16 bits too), DICOM."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from guided_diffusion.images import deep_colour, tiff
from guided_diffusion.images.complete import is_complete
from guided_diffusion.images.decoded import DecodedImage, PixelSize, Undecodable, linear_window
from guided_diffusion.images.dicom_prefix import HEAD_BYTES, is_dicom
from guided_diffusion.images.files import (
    DICOM_EXTENSIONS,
    IMAGE_EXTENSIONS,
    has_dicom_extension,
    open_file,
)
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.storage.files import write_atomically

INTENSITY_RULES = ("full", "percentile", "window")
MAX_PIXELS = 100_000_000
"""Height times width: a whole spine at 0.1 mm has half of it, a decompression bomb far more."""

# The formats that Pillow may try: some of its other plugins run interpreters.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
_BITS = {"1": 1, "I": 32, "F": 32}
# Pillow's names of formats that differ from the extension; its own table imports every plugin
_SAVE_FORMATS = {".jpg": "JPEG", ".tif": "TIFF"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".tif": {"compression": "tiff_deflate"},
    ".tiff": {"compression": "tiff_deflate"},
    ".webp": {"lossless": True, "exact": True},
    ".jpg": {"quality": 95},
    ".jpeg": {"quality": 95},
}
# Pillow also raises what it logs; without a handler the log would go to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class ImageError(UserError):
    """A file that does not hold a usable image or mask. The message names it."""


@dataclass(frozen=True)
class Intensity:
    """How a file's grey levels are mapped to [0, 1], from black to white.

    - `full`: from the whole range of the file's type (DICOM: BitsStored); nothing is clipped.
      Floats: from [0, 1] if all values are in it, else from their minimum and maximum.
    - `percentile`: from the `low`-th to the `high`-th percentile of the file's pixels.
    - `window`: from `width` values around `center`, in the file's values (DICOM: after rescaling).
      If these are None: the file's own table or window, else its minimum and maximum.
    """

    rule: str = "full"
    low: float = 0.5
    high: float = 99.5
    center: float | None = None
    width: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in INTENSITY_RULES:
            raise UserError(f"intensity {self.rule!r} must be one of {', '.join(INTENSITY_RULES)}")
        if not 0 <= self.low < self.high <= 100:
            raise UserError(f"percentiles {self.low} and {self.high} must rise, within 0 to 100")
        if (self.center is None) != (self.width is None):
            raise UserError("a window needs both its center and its width, or neither")
        if self.width is not None and not self.width > 0:
            raise UserError(f"window width {self.width} must be above 0")


def read_image(
    path: str, channels: int | None = None, intensity: Intensity | None = None
) -> np.ndarray:
    """Read an image. Transparent pixels are shown on black; EXIF orientation is applied.

    :param channels: 1 converts colour to luminance, 3 repeats grey, None keeps what the file has.
    :param intensity: by default `Intensity("full")`.
    :return: [H x W] (grey) or [H x W x 3], black is 0; uint8 if the file has 8 bits and the rule is
        "full", else float32 in [0, 1].
    :raises ImageError: if the file is unreadable.
    """
    return read_counted(path, channels, intensity)[0]


def read_counted(
    path: str, channels: int | None = None, intensity: Intensity | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `read_image`, and those of its pixels that statistics may count: [N] or [N x 3].

    The padding of DICOM and values that are no finite numbers are black, but do not count.
    """
    with image_errors(path):
        decoded = _decode(path)
        image = _apply_intensity(decoded, intensity or Intensity())
        if channels == 1 and image.ndim == 3:
            image = _luminance(image)
        elif channels == 3 and image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        padding = decoded.padding
        if padding is None or padding.all():
            padding = np.zeros(image.shape[:2], bool)
        return image, image[~padding]


def check_image(path: str) -> None:
    """Check that a file is a complete image; it is decoded only where its end does not tell.

    :raises ImageError: if it is not.
    """
    with image_errors(path), open_file(path) as file:
        whole = is_complete(file, _identify(file, path), MAX_PIXELS)
    if not whole:
        read_image(path)


def check_images(paths: Sequence[str]) -> None:
    """`check_image` for thousands of files, before a long run starts."""
    with (
        ThreadPoolExecutor() as pool,
        progress_bar(len(paths), "image", desc="checking", leave=False, delay=2) as bar,
    ):
        for _ in pool.map(check_image, paths):
            bar.update()


def is_grey(path: str) -> bool:
    """Whether an image has one channel, or three equal ones."""
    image = read_image(path)
    return image.ndim == 2 or equal_channels(image)


def write_image(path: str, image: np.ndarray) -> None:
    """Write an image atomically, in the format of the file's extension.

    :param image: `[H x W]`, `[H x W x 1]` (both grey) or `[H x W x 3]`; uint8, floats in [0, 1]
        (written as 8 bits), or uint16 (grey, to PNG or TIFF).
    :raises ImageError: if the format does not exist or cannot hold the image.
    """
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.dtype.kind == "f":
        image = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    save_picture(path, Image.fromarray(image))


def save_picture(path: str, picture: Image.Image, **options: Any) -> None:
    """Write a Pillow picture of any mode atomically, in the format of the file's extension.

    :param options: of the format, for `Image.save`.
    :raises ImageError: if the format does not exist or cannot hold the picture.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in IMAGE_EXTENSIONS or ending in DICOM_EXTENSIONS:
        raise ImageError(f"{path} cannot be written; choose .png or .tif")
    options = {**_SAVE_OPTIONS.get(ending, {}), **options}
    encoded = io.BytesIO()
    try:
        picture.save(encoded, _SAVE_FORMATS.get(ending, ending[1:].upper()), **options)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be written: {error}") from error
    write_atomically(path, lambda file: file.write(encoded.getvalue()))


def pixel_spacing(path: str) -> PixelSize | None:
    """The size of a pixel, in millimetres, where a DICOM file states it, else None."""
    with image_errors(path), open_file(path) as file:
        if _identify(file, path) is not None:
            return None
        from guided_diffusion.images import dicom_io  # and with it pydicom, for DICOM only

        return dicom_io.read_dicom_spacing(file.read(), MAX_PIXELS)


def bit_depth(path: str) -> int:
    """Bits per pixel and channel, according to the file."""
    with image_errors(path), open_file(path) as file:
        picture = _identify(file, path)
        if picture is None:
            from guided_diffusion.images import dicom_io  # and with it pydicom, for DICOM only

            return dicom_io.read_dicom_bits(file.read(), MAX_PIXELS)
        deep = picture.mode.startswith("I;16") or ";16" in str(picture.tile[:1])
        bits = 16 if deep else _BITS.get(picture.mode, 8)
        return getattr(picture, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (bits,))[0]


@contextlib.contextmanager
def image_errors(path: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageError that names the file; silence warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        link = f": it is a link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise ImageError(f"{path} does not exist{link}") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a folder, not a file") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{path} cannot be read: its content is not an image of a known format; remove it, or"
            " convert it to PNG or TIFF"
        ) from error
    except Undecodable as error:
        raise ImageError(f"{path} cannot be read: {_printable(str(error))}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} cannot be read: it claims more than {MAX_PIXELS} pixels, the limit; reduce it"
        ) from error
    except MemoryError as error:
        raise ImageError(f"{path} cannot be read: it does not fit into memory") from error
    except OSError as error:  # the system's, or Pillow's about truncated and broken data
        reason = error.strerror or f"{_printable(str(error))[:200]}; copy or export it again"
        raise ImageError(f"{path} cannot be read: {reason}") from error
    except Exception as error:  # decoders raise anything, from struct.error to RecursionError
        raise ImageError(
            f"{path} cannot be read: it is damaged, or of a kind that is not supported; export it"
            " again, or convert it to PNG or TIFF with an image viewer"
        ) from error


def _printable(text: str) -> str:
    """A text on one line, without the control characters that damaged files put into it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _decode(path: str) -> DecodedImage:
    """A file's values and their range."""
    opened = open_image(path)
    if isinstance(opened, bytes):
        from guided_diffusion.images import dicom_io  # and with it pydicom, for DICOM only

        return dicom_io.read_dicom(opened, MAX_PIXELS)
    return _picture_values(opened)


def open_image(path: str) -> Image.Image | bytes:
    """The decoded picture, or the content of a DICOM file."""
    with open_file(path) as file:
        picture = _identify(file, path)
        return file.read() if picture is None else _load(picture, file)


def _identify(file: BinaryIO, path: str) -> ImageFile.ImageFile | None:
    """The picture, not decoded yet; None, and the file at its start, if it should be DICOM."""
    head = file.read(HEAD_BYTES)
    if not head:
        raise Undecodable("the file is empty; copy or export it again")
    file.seek(0)
    if is_dicom(head):
        return None
    try:
        return Image.open(file, formats=_FORMATS)
    except Image.UnidentifiedImageError:
        if head[:4] in tiff.MAGIC:
            raise tiff.unsupported(file) from None
        if not has_dicom_extension(path):
            raise
    file.seek(0)
    return None


def _load(picture: ImageFile.ImageFile, file: BinaryIO) -> Image.Image:
    """Decode with Pillow, and apply the EXIF orientation."""
    if picture.width * picture.height > MAX_PIXELS:
        raise Undecodable(
            f"it claims {picture.height} x {picture.width} pixels; {MAX_PIXELS} is the limit;"
            " reduce it"
        )
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        tiff.mend(picture)
    if picture.format == "BMP" and picture.mode == "1" and _bmp_bits(file) != 1:
        raise Undecodable(
            "it is a BMP file of 8 bits with a palette of black and white, which Pillow misreads;"
            " save it as PNG"
        )
    picture.info["grey_step"] = _grey_step(picture)
    lossy = _lossy_format(picture, file)
    with tiff.silent_libtiff() if picture.format == "TIFF" else contextlib.nullcontext():
        frames = getattr(picture, "n_frames", 1)
        low = deep_colour.low_bytes(picture, file)
        picture.load()
    if frames != 1 and picture.format != "MPO":  # the other frames of a camera's MPO are previews
        raise Undecodable(f"it holds {frames} frames; save the wanted one as a file of its own")
    ImageOps.exif_transpose(picture, in_place=True)
    picture.info["lossy"] = lossy
    picture.info["deep"] = None if low is None else deep_colour.join(picture, low)
    return picture


def _bmp_bits(file: BinaryIO) -> int:
    """Bits per pixel of a BMP file. Leaves the file where it is."""
    start = file.tell()
    file.seek(28)
    bits = int.from_bytes(file.read(2), "little")
    file.seek(start)
    return bits


def _grey_step(picture: ImageFile.ImageFile) -> int:
    """By what Pillow will multiply grey values of 2 or 4 bits, so that they fill 8 bits."""
    arguments = picture.tile[0].args if picture.tile else ""
    raw_mode = arguments if isinstance(arguments, str) else str((arguments or ("",))[0])
    return {"L;2": 85, "L;4": 17}.get(raw_mode[:3], 1)


def _lossy_format(picture: ImageFile.ImageFile, file: BinaryIO) -> str:
    """The compression that changed a picture's values when it was saved, "" if none did."""
    if picture.format == "WEBP":
        return "" if _is_lossless_webp(file) else "lossy WebP"
    compression = picture.info.get("compression")
    return "JPEG" if picture.format in ("JPEG", "MPO") or compression in _LOSSY_TIFF else ""


def _is_lossless_webp(file: BinaryIO) -> bool:
    """Whether the first picture of a WebP file is coded as VP8L. Leaves the file where it is."""
    start = file.tell()
    file.seek(12)
    try:
        while len(head := file.read(8)) == 8:
            if head[:4] in (b"VP8 ", b"VP8L"):
                return head[:4] == b"VP8L"
            size = int.from_bytes(head[4:], "little")
            file.seek(16 if head[:4] == b"ANMF" else size + size % 2, os.SEEK_CUR)
    finally:
        file.seek(start)
    return False


def _picture_values(picture: Image.Image) -> DecodedImage:
    mode, deep = picture.mode, picture.info.get("deep")
    if deep is not None:
        return _deep_colours(picture, deep)
    if mode in ("I", "F") or mode.startswith("I;16") or (mode == "L" and tiff.is_signed(picture)):
        return tiff.deep_values(picture)
    if mode not in ("1", "L") and picture.has_transparency_data:
        _check_visible(np.asarray(picture.convert("RGBA").getchannel("A")))
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    values = np.array(picture.convert("L" if mode in ("1", "L", "LA", "La") else "RGB"))
    if mode in ("P", "PA") and equal_channels(values):
        values = values[..., 0]
    return DecodedImage(values, (0.0, 255.0))


def _deep_colours(picture: Image.Image, deep: np.ndarray) -> DecodedImage:
    """Colour, or grey with alpha, of 16 bits: uint16 [H x W x C]."""
    if deep.shape[-1] != 3:
        _check_visible(deep[..., -1])
    values = deep_colour.on_black(deep)
    invisible = picture.info.get("transparency")
    if isinstance(invisible, tuple) and len(invisible) == deep.shape[-1]:
        shown = (deep != np.array(invisible)).any(axis=-1)
        _check_visible(shown)
        values = values * shown[..., None].astype(np.uint16)
    return DecodedImage(values, (0.0, 65535.0))


def _check_visible(alpha: np.ndarray) -> None:
    if not alpha.any():
        raise Undecodable("it is transparent in all of its pixels; save it without transparency")


def _apply_intensity(image: DecodedImage, intensity: Intensity) -> np.ndarray:
    """uint8 if nothing changes, else float32 in [0, 1]; black is 0 afterwards."""
    values = image.values
    if values.size == 0:
        raise Undecodable("it has no pixels")
    if values.dtype.kind == "f":
        image.padding = _without_numbers(values, image.padding)
    counted = values if image.padding is None else values[~image.padding]
    if intensity.rule == "full" and values.dtype == np.uint8 and image.limits == (0.0, 255.0):
        scaled = 255 - values if image.inverted else values
    elif counted.size == 0:
        scaled = np.zeros(values.shape, np.float32)
    else:
        with np.errstate(invalid="ignore"):  # in padding, which is black whatever comes out
            scaled = _scale(image, values, counted, intensity)
        scaled = 1 - scaled if image.inverted else scaled
    if image.padding is not None:
        scaled[image.padding] = 0
    return scaled


def _scale(
    image: DecodedImage, values: np.ndarray, counted: np.ndarray, intensity: Intensity
) -> np.ndarray:
    """Map `values` to float32 in [0, 1], by the `counted` ones among them."""
    if intensity.rule == "window" and intensity.center is not None and intensity.width is not None:
        return linear_window(values, intensity.center, intensity.width)
    if intensity.rule == "window" and image.window is not None:
        return image.window(values)
    low, high = _black_and_white(counted, image.limits, intensity)
    exact: np.dtype[Any] = np.dtype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    span = exact.type(max(high - low, np.finfo(exact).tiny))
    scaled = (values.astype(exact) - exact.type(low)) / span
    return scaled.clip(0.0, 1.0).astype(np.float32)


def _black_and_white(
    values: np.ndarray, limits: tuple[float, float] | None, intensity: Intensity
) -> tuple[float, float]:
    """The values that are mapped to 0 and 1."""
    smallest, largest = float(values.min()), float(values.max())
    low, high = smallest, largest
    if intensity.rule == "percentile":
        low, high = np.percentile(values, (intensity.low, intensity.high))
    elif intensity.rule == "full" and limits is not None:
        low, high = limits
    elif intensity.rule == "full" and smallest >= 0 and largest <= 1:
        low, high = 0.0, 1.0
    return (low, high) if low < high else (smallest, largest)


def _without_numbers(values: np.ndarray, padding: np.ndarray | None) -> np.ndarray | None:
    """The padding [H x W] and the pixels that are NaN or infinite."""
    odd = ~np.isfinite(values)
    odd = odd.any(axis=-1) if odd.ndim == 3 else odd
    if odd.all():
        raise Undecodable("it holds no finite number")
    return (odd if padding is None else odd | padding) if odd.any() else padding


def _luminance(image: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 luma; equal channels keep their exact values."""
    if image.dtype == np.uint8:
        return np.array(Image.fromarray(image).convert("L"))
    if equal_channels(image):
        return image[..., 0]
    return image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def equal_channels(image: np.ndarray) -> bool:
    return np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(
        image[..., 0], image[..., 2]
    )
