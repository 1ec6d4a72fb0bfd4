"""Where a radiograph lies in space, as ITK places it, and with it 3D Slicer and ITK-SNAP."""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import RESOLUTION_UNIT, X_RESOLUTION, Y_RESOLUTION

from guided_diffusion.images.image_io import MAX_PIXELS, image_errors, open_image

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_PROJECTIONS = (f"{_STORAGE}1.", f"{_STORAGE}12.")  # CR, DX, mammography, intra-oral, XA, XRF
_CAPTURES = f"{_STORAGE}7."


@dataclass(frozen=True)
class Placement:
    """A plane in the patient's coordinates, mm to the left, back and head (LPS).

    spacing: between the centres of columns and of rows. origin: of the first pixel. axes: unit
    vectors of the direction in which the columns follow each other, that of the rows, and the
    normal.
    """

    spacing: tuple[float, float] = (1.0, 1.0)
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    axes: tuple[tuple[float, ...], ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

    def steps(self) -> np.ndarray:
        """[3 x 3]: the way from a pixel to the next column, the next row, the next plane."""
        return np.array(self.axes) * np.array([*self.spacing, 1.0])[:, None]


def _resolution(picture: Image.Image) -> tuple[float, float]:
    """The size of a pixel, mm, as the dots per inch or cm of JPEG and TIFF say."""
    x, y, unit = 0.0, 0.0, 0
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        x, y = float(tags.get(X_RESOLUTION, 0)), float(tags.get(Y_RESOLUTION, 0))
        unit = tags.get(RESOLUTION_UNIT, 2) - 1
    elif picture.format in ("JPEG", "MPO"):
        x, y = picture.info.get("jfif_density", (0, 0))
        unit = picture.info.get("jfif_unit", 0)
    millimetres = {1: 25.4, 2: 10.0}.get(unit)
    known = millimetres and 0 < x < math.inf and 0 < y < math.inf
    return (millimetres / x, millimetres / y) if millimetres and known else (1.0, 1.0)


def find_placement(path: str) -> Placement:
    """The placement of a file.

    Of DICOM files ITK takes the spacing from ImagerPixelSpacing where the kind of file is a
    projection, at the detector, and else from PixelSpacing; from NominalScannedPixelSpacing for
    secondary captures without it. Pictures lie at the origin; JPEG and TIFF may state a resolution.
    What is missing is 1 mm.

    :raises ImageError: if the file cannot be read.
    """
    with image_errors(path):
        content = open_image(path)
        if not isinstance(content, bytes):
            return Placement(_resolution(content))
        from guided_diffusion.images.dicom_file import numbers, parse, value_of

        dataset = parse(content, MAX_PIXELS)
        kind = f"{value_of(dataset, 'SOPClassUID') or ''}."
        keys = ["ImagerPixelSpacing"] if kind.startswith(_PROJECTIONS) else ["PixelSpacing"]
        if kind == _CAPTURES:
            keys.append("NominalScannedPixelSpacing")
        found = (numbers(dataset, key) for key in keys)
        sides = next((s for s in found if len(s) == 2 and min(s) > 0), [1.0, 1.0])
        origin = numbers(dataset, "ImagePositionPatient")
        cosines = numbers(dataset, "ImageOrientationPatient")
    placement = Placement((sides[1], sides[0]))
    if len(origin) == 3:
        placement = replace(placement, origin=tuple(origin))
    if len(cosines) == 6:
        axes = np.reshape(cosines, (2, 3))
        if np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
            planes = (*axes.tolist(), np.cross(*axes).tolist())
            placement = replace(placement, axes=tuple(map(tuple, planes)))
    return placement
