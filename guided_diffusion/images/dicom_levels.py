"""How a DICOM file maps its stored values to grey levels: tables, rescaling, windows."""

import math

import numpy as np
import pydicom
from pydicom import uid

from guided_diffusion.images.decoded import Undecodable, Window, exact_window, linear_window
from guided_diffusion.images.dicom_file import EXPORT_AGAIN, number, numbers, value_of

Limits = tuple[float, float]


def modality_values(
    dataset: pydicom.Dataset, stored: np.ndarray, limits: Limits | None
) -> tuple[np.ndarray, Limits | None]:
    """Values after the modality table or rescaling (PS3.3 C.11.1), and their limits likewise."""
    if value_of(dataset, "ModalityLUTSequence"):
        values, top = _look_up(dataset, "ModalityLUTSequence", stored)
        return values, (0.0, top)
    slope = number(dataset, "RescaleSlope", 1.0)
    intercept = number(dataset, "RescaleIntercept", 0.0)
    if slope == 0:
        raise Undecodable("its RescaleSlope is 0, which makes all pixels equal; correct it")
    if slope == 1.0 and intercept == 0.0:
        return stored, limits
    if limits is not None:
        low, high = sorted(limit * slope + intercept for limit in limits)
        limits = low, high
    return stored * np.float64(slope) + intercept, limits


def own_window(dataset: pydicom.Dataset) -> Window | None:
    """The file's own mapping to grey levels: its table, else its first window (PS3.3 C.11.2).

    A window without a number or with a width not above 0 counts as none.
    """
    if value_of(dataset, "VOILUTSequence"):

        def table_window(values: np.ndarray) -> np.ndarray:
            looked_up, top = _look_up(dataset, "VOILUTSequence", values)
            return (looked_up / top).clip(0.0, 1.0).astype(np.float32)

        return table_window
    try:
        pairs = zip(numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth"))
    except Undecodable:
        return None
    center, width = next(((c, w) for c, w in pairs if w > 0), (0.0, 0.0))
    if not width:
        return None
    function = str(value_of(dataset, "VOILUTFunction") or "LINEAR").strip().upper()
    if function == "SIGMOID":
        return lambda values: _sigmoid(4 * (values - center) / width)
    if function == "LINEAR_EXACT":
        return lambda values: exact_window(values, center, width)
    return lambda values: linear_window(values, center, width)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return (0.5 + 0.5 * np.tanh(0.5 * values)).astype(np.float32)


def _look_up(
    dataset: pydicom.Dataset, sequence: str, values: np.ndarray
) -> tuple[np.ndarray, float]:
    """Map values by the first table of a sequence.

    Values below the range of the table take its first entry, values above it the last (PS3.3 C.11.1
    and C.11.2). pydicom's apply_modality_lut and apply_voi fail for some depths of entries, wrap
    indices above 255 if entries have 8 bits, and do not recognise a negative first value that was
    written as unsigned.

    :return: the mapped values, float64, and the largest that the bits of an entry can hold.
    """
    try:
        item = dataset[sequence].value[0]
        entries, first, bits = (int(number) for number in item.LUTDescriptor)
        table = _table(item.LUTData, entries or 2**16, _word_order(dataset))
    except Exception as error:  # a malformed item raises anything
        raise Undecodable(f"its {sequence} is malformed; {EXPORT_AGAIN}") from error
    if not 1 <= bits <= 16 or len(table) < (entries or 2**16):
        raise Undecodable(
            f"its {sequence} holds {len(table)} of {entries or 2**16} entries of {bits} bits, but"
            f" must hold all, of 1 to 16 bits; {EXPORT_AGAIN}"
        )
    if first >= 2**15 and values.min() < 0:  # a negative number, written as unsigned
        first -= 2**16
    places = np.rint(values).astype(np.int64) - first
    return table[places.clip(0, len(table) - 1)], max(2.0**bits - 1, table.max())


def _word_order(dataset: pydicom.Dataset) -> str:
    return ">" if dataset.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian else "<"


def _table(data: object, entries: int, order: str) -> np.ndarray:
    """The entries of a table as float64: of a byte each, in bytes or two to a word, or of words."""
    if isinstance(data, bytes):
        narrow = len(data) in (entries, entries + 1)
        table = np.frombuffer(data, np.uint8 if narrow else f"{order}u2")
    else:
        table = np.atleast_1d(np.asarray(data, dtype=np.float64))
        if entries > 1 and len(table) == math.ceil(entries / 2):
            table = table.astype("<u2").view(np.uint8)
    return table[:entries].astype(np.float64)
