"""Reading DICOM files with pydicom. `Undecodable` says what is wrong, without naming the file."""

import numpy as np
import pydicom
from pydicom import pixels, uid

from guided_diffusion.images.decoded import DecodedImage, PixelSize, Undecodable
from guided_diffusion.images.dicom_file import (
    EXPORT_AGAIN,
    number,
    numbers,
    parse,
    value_of,
    whole,
)
from guided_diffusion.images.dicom_levels import Limits, modality_values, own_window

# where the pixels may be: the type of the padding's elements is the same
_PIXEL_KEYS = {
    "PixelData": "",
    "FloatPixelData": "Float",
    "DoubleFloatPixelData": "DoubleFloat",
}
_LOSSY_SYNTAXES = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless)
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_INSTALL_DECODERS = "install more decoders: pip install '.[dicom]' in the checkout"


def read_dicom(content: bytes, max_pixels: int) -> DecodedImage:
    """Decode the image of a DICOM file.

    :raises Undecodable: or an error of pydicom, if it holds no image, several, or a damaged one.
    """
    dataset = parse(content, max_pixels)
    raw = _raw(dataset, max_pixels)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return _colours(dataset, _stored(dataset, raw))
    padding = _padding(dataset, raw)
    stored = _stored(dataset, raw, padding)
    limits = _stored_limits(dataset, stored if padding is None else stored[~padding])
    if stored.ndim == 3:
        return DecodedImage(stored, limits)
    values, limits = modality_values(dataset, stored, limits)
    return DecodedImage(values, limits, _is_inverted(dataset), own_window(dataset), padding)


def _is_inverted(dataset: pydicom.Dataset) -> bool:
    """Whether low values are shown bright."""
    # INVERSE belongs to MONOCHROME1, and says the same; alone it inverts as well
    shape = str(value_of(dataset, "PresentationLUTShape") or "").strip().upper()
    return dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE"


def read_dicom_mask(content: bytes, max_pixels: int) -> tuple[np.ndarray, str]:
    """The stored values [H x W] or [H x W x 3] as they are, and the lossy compression or ""."""
    dataset = parse(content, max_pixels)
    values = _stored(dataset, _raw(dataset, max_pixels))
    if _is_inverted(dataset) and set(np.unique(values).tolist()) in (
        {0, 255},
        {0, 4095},
        {0, 65535},
    ):
        raise Undecodable(
            "it is a black-and-white mask shown inverted (MONOCHROME1), so that its foreground is"
            " unclear; export it as MONOCHROME2 or PNG"
        )
    lossy = str(value_of(dataset, "LossyImageCompression") or "") == "01"
    syntax = dataset.file_meta.TransferSyntaxUID
    return values, "lossy DICOM" if lossy or syntax in _LOSSY_SYNTAXES else ""


def read_dicom_bits(content: bytes, max_pixels: int) -> int:
    """Bits per pixel and channel."""
    dataset = parse(content, max_pixels)
    return int(value_of(dataset, "BitsStored") or value_of(dataset, "BitsAllocated") or 16)


def read_dicom_spacing(content: bytes, max_pixels: int) -> PixelSize | None:
    """The size of a pixel, in the patient where the file tells it (PS3.3 10.7.1).

    PixelSpacing, unless it only repeats ImagerPixelSpacing without a word about calibration; else
    ImagerPixelSpacing, divided by EstimatedRadiographicMagnificationFactor where that is known.
    """
    dataset = parse(content, max_pixels)
    spacing, imager = _sides(dataset, "PixelSpacing"), _sides(dataset, "ImagerPixelSpacing")
    calibrated = value_of(dataset, "PixelSpacingCalibrationType") is not None
    if spacing and (calibrated or spacing != imager):
        return PixelSize(*spacing)
    if imager is None:
        return None
    factor = number(dataset, "EstimatedRadiographicMagnificationFactor", 0.0)
    if factor >= 1:  # a shadow is not smaller than what casts it
        return PixelSize(imager[0] / factor, imager[1] / factor)
    return PixelSize(*imager, at_detector=True)


def _sides(dataset: pydicom.Dataset, key: str) -> tuple[float, float] | None:
    sides = numbers(dataset, key)
    return (sides[0], sides[1]) if len(sides) == 2 and min(sides) > 0 else None


def _raw(dataset: pydicom.Dataset, max_pixels: int) -> np.ndarray:
    """Decoded values [H x W] or [H x W x 3]; of uncompressed pixels with their unused bits."""
    key = _pixel_key(dataset)
    _check_elements(dataset, key, max_pixels)
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        _check_length(dataset, key)
    elif not _is_decodable(syntax):
        raise Undecodable(f"it is compressed as {syntax.name}; {_INSTALL_DECODERS}")
    try:
        raw = pixels.pixel_array(dataset, correct_unused_bits=bool(syntax.is_encapsulated))
    except RuntimeError as error:
        if not syntax.is_encapsulated:
            raise
        raise Undecodable(
            f"its {syntax.name} data could not be decoded: it is damaged, or of a kind for which "
            f"to {_INSTALL_DECODERS}"
        ) from error
    shape = (dataset.Rows, dataset.Columns, 3)[: 2 + (dataset.SamplesPerPixel == 3)]
    if raw.shape != shape:
        raise Undecodable(
            f"its pixels have the shape {raw.shape}, but its elements say {shape}; {EXPORT_AGAIN}"
        )
    return raw


def _stored(
    dataset: pydicom.Dataset, raw: np.ndarray, padding: np.ndarray | None = None
) -> np.ndarray:
    """The values in the bits that BitsStored and HighBit name, the others cleared.

    In many files HighBit is wrong; it counts if the bits below it are unused as well. Unused bits
    above may hold anything constant, or overlays; if they vary, BitsStored must be wrong.
    """
    stored = _low_bits(dataset, raw)
    if stored is raw or np.array_equal(raw, stored):
        return raw
    unused = dataset.BitsAllocated - dataset.BitsStored
    highest = value_of(dataset, "HighBit") == dataset.BitsAllocated - 1
    if highest and not (raw & ((1 << unused) - 1)).any():
        return np.right_shift(raw, unused)
    odd = raw - stored if padding is None else (raw - stored)[~padding]
    overlays = any(element.tag.group >> 8 == 0x60 for element in dataset)
    if odd.size and (odd != odd.flat[0]).any() and not overlays:
        raise Undecodable(
            f"its values need more bits than BitsStored, {dataset.BitsStored}, with HighBit"
            f" {value_of(dataset, 'HighBit')}; correct them, or {EXPORT_AGAIN}"
        )
    return stored


def _low_bits(dataset: pydicom.Dataset, raw: np.ndarray) -> np.ndarray:
    """Values [H x W ...] without what uncompressed pixels have above BitsStored."""
    if raw.dtype.kind == "f" or dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return raw
    unused = 8 * raw.dtype.itemsize - int(dataset.BitsStored)
    return np.right_shift(np.left_shift(raw, unused), unused)


def _colours(dataset: pydicom.Dataset, stored: np.ndarray) -> DecodedImage:
    try:
        colours = pixels.apply_color_lut(stored, dataset)
    except Exception as error:  # a malformed table raises anything
        raise Undecodable(f"its palette is missing or malformed; {EXPORT_AGAIN}") from error
    return DecodedImage(colours, (0.0, float(np.iinfo(colours.dtype).max)))


def _pixel_key(dataset: pydicom.Dataset) -> str:
    key = next((key for key in _PIXEL_KEYS if key in dataset), None)
    if key is None:
        modality = value_of(dataset, "Modality")
        what = f" (modality {modality})" if modality else ""
        raise Undecodable(f"it is DICOM without an image{what}; remove it")
    return key


def _check_elements(dataset: pydicom.Dataset, key: str, max_pixels: int) -> None:
    """Check what decoding depends on, and complete what follows from the rest."""
    frames = value_of(dataset, "NumberOfFrames") or 1
    if not str(frames).isdecimal():
        raise Undecodable(f"its NumberOfFrames is {str(frames)!r}, not a number; correct it")
    if int(frames) > 1:
        raise Undecodable(
            f"it holds {int(frames)} frames; save the wanted one as a file of its own"
        )
    dataset.NumberOfFrames = 1
    rows, columns = (whole(dataset, side, range(1, 2**16)) for side in ("Rows", "Columns"))
    if rows * columns > max_pixels:
        raise Undecodable(
            f"it claims {rows} x {columns} pixels; {max_pixels} is the limit; reduce it"
        )
    meaning = str(value_of(dataset, "PhotometricInterpretation") or "").strip().upper()
    if meaning not in (*_GREY, *_COLOUR, "PALETTE COLOR"):
        raise Undecodable(
            f"its PhotometricInterpretation is {meaning or 'missing'}, so what its values mean is"
            f" unknown; correct it to {', '.join((*_GREY, 'PALETTE COLOR', *_COLOUR[:-1]))} or"
            f" {_COLOUR[-1]}"
        )
    samples = 3 if meaning in _COLOUR else 1
    if whole(dataset, "SamplesPerPixel", range(1, 2**16), samples) != samples:
        raise Undecodable(
            f"its SamplesPerPixel is {dataset.SamplesPerPixel}, but {meaning} has {samples};"
            " correct one of them"
        )
    native = not dataset.file_meta.TransferSyntaxUID.is_encapsulated
    if native and meaning in ("YBR_ICT", "YBR_RCT"):
        raise Undecodable(f"its colours are {meaning}, which only JPEG 2000 has; {EXPORT_AGAIN}")
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = meaning, samples
    if samples == 3:
        planes = whole(dataset, "PlanarConfiguration", range(2), None if native else 0)
        dataset.PlanarConfiguration = planes
    if key == "PixelData":
        _check_bits(dataset)


def _check_bits(dataset: pydicom.Dataset) -> None:
    allocated = whole(dataset, "BitsAllocated", range(1, 65))
    if allocated not in (1, 8, 16, 32, 64):
        raise Undecodable(
            f"its BitsAllocated is {allocated}, not 1, 8, 16, 32 or 64; {EXPORT_AGAIN}"
        )
    default = None
    if value_of(dataset, "BitsStored") is None and value_of(dataset, "HighBit") is not None:
        default = whole(dataset, "HighBit", range(allocated)) + 1
    dataset.BitsStored = whole(dataset, "BitsStored", range(1, allocated + 1), default)
    dataset.PixelRepresentation = whole(dataset, "PixelRepresentation", range(2))


def _check_length(dataset: pydicom.Dataset, key: str) -> None:
    """Uncompressed pixels must be as many as the elements say: else rows are sheared or missing."""
    if dataset[key].is_undefined_length:
        raise Undecodable(
            "its pixels are compressed, but its transfer syntax does not say how; " + EXPORT_AGAIN
        )
    bits = {"PixelData": dataset.get("BitsAllocated"), "FloatPixelData": 32}.get(key, 64)
    if dataset.PhotometricInterpretation == "YBR_FULL_422":
        return
    samples = dataset.SamplesPerPixel
    row = dataset.Columns * samples * bits / 8
    expected, found = int(np.ceil(dataset.Rows * row)), len(dataset[key].value or b"")
    if not expected <= found < expected + max(row, 2):
        relation = "less" if found < expected else "more"
        raise Undecodable(
            f"its pixel data have {found} bytes, {relation} than expected: {dataset.Rows} x"
            f" {dataset.Columns} pixels of {samples} x {bits} bits are {expected}. Correct Rows,"
            f" Columns or BitsAllocated, or {EXPORT_AGAIN}"
        )


def _is_decodable(syntax: uid.UID) -> bool:
    try:
        return pixels.get_decoder(syntax).is_available
    except NotImplementedError:  # video
        return False


def _padding(dataset: pydicom.Dataset, raw: np.ndarray) -> np.ndarray | None:
    """Which pixels only fill the rectangle: those of PixelPaddingValue, or from there to
    PixelPaddingRangeLimit. Both are stored values (PS3.3 C.7.5.1.1.2)."""
    prefix = _PIXEL_KEYS[_pixel_key(dataset)]
    ends = numbers(dataset, f"{prefix}PixelPaddingValue")[:1]
    if not ends or raw.ndim != 2:
        return None
    ends += numbers(dataset, f"{prefix}PixelPaddingRangeLimit")[:1]
    if raw.dtype.kind == "f":
        low, high = np.array([min(ends), max(ends)], raw.dtype)
    else:
        # the sign of the element, of 16 bits, often contradicts that of the pixels
        offset = 2**15 if raw.dtype.kind == "i" else 0
        ends = [(end + offset) % 2**16 - offset for end in ends]
        low, high = min(ends), max(ends)
        least, most = _bit_limits(raw.dtype, int(dataset.BitsStored))
        if least <= low and high <= most:
            raw = _low_bits(dataset, raw)
    found = (raw >= low) & (raw <= high)
    return found if found.any() else None


def _stored_limits(dataset: pydicom.Dataset, stored: np.ndarray) -> Limits | None:
    """The smallest and largest value that BitsStored allows; None for floats."""
    if stored.dtype.kind == "f":
        return None
    for bits in (int(dataset.BitsStored), 8 * stored.dtype.itemsize):
        low, high = _bit_limits(stored.dtype, bits)
        # some files hold larger values than they declare; these must not be clipped
        if stored.size == 0 or (low <= stored.min() and stored.max() <= high):
            break
    return low, high


def _bit_limits(dtype: np.dtype, bits: int) -> Limits:
    half = 2.0 ** (bits - 1)
    return (-half, half - 1) if dtype.kind == "i" else (0.0, 2 * half - 1)
