"""What a decoder returns, whatever the format of the file."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Window = Callable[[np.ndarray], np.ndarray]


class Undecodable(ValueError):
    """Why a file is no usable image and what to do about it; the caller names the file."""


@dataclass
class DecodedImage:
    """The pixels of any file format, before an intensity rule is applied.

    values    [H x W] or [H x W x 3], rescaled (DICOM: slope and intercept, or modality table)
    limits    smallest and largest value that the stored bits can hold, rescaled likewise; None for
              floats, which have none
    inverted  whether the smallest value is white
    window    maps values to [0, 1] by the file's own table or window; None if it has neither
    padding   bool [H x W], True where a pixel is no part of the image; None if all of them are
    """

    values: np.ndarray
    limits: tuple[float, float] | None
    inverted: bool = False
    window: Window | None = None
    padding: np.ndarray | None = None


class PixelSize(tuple[float, float]):
    """Height and width of a pixel in mm.

    at_detector: they are measured at the detector. The projection magnifies, by 1.05 to 2, so that
    structures in the patient are smaller by this unknown factor.
    """

    at_detector: bool

    def __new__(cls, height: float, width: float, at_detector: bool = False) -> "PixelSize":
        size = super().__new__(cls, (height, width))
        size.at_detector = at_detector
        return size


def linear_window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Map values to [0, 1] by the function LINEAR of DICOM PS3.3 C.11.2.1.2.1.

    It is defined for widths from 1 on; narrower windows, of fractions, follow LINEAR_EXACT.
    """
    if width == 1:
        return (values > center - 0.5).astype(np.float32)
    if width < 1:
        return exact_window(values, center, width)
    scaled = (values - (center - 0.5)) / (width - 1) + 0.5
    return scaled.clip(0.0, 1.0).astype(np.float32)


def exact_window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Map values to [0, 1] by the function LINEAR_EXACT of DICOM PS3.3 C.11.2.1.3.2."""
    return ((values - center) / width + 0.5).clip(0.0, 1.0).astype(np.float32)
