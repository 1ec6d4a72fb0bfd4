"""The plane in which a radiograph lies, by which label maps are turned."""

import math

from guided_diffusion.images.dicom_prefix import HEAD_BYTES, is_dicom
from guided_diffusion.images.files import open_file
from guided_diffusion.images.image_io import ImageError, image_errors
from guided_diffusion.segmentation.annotations.reading.volumes import AS_SEEN, Plane


def plane_of(path: str) -> Plane:
    """The directions of columns and rows that a DICOM file states; else `AS_SEEN`."""
    try:
        with image_errors(path), open_file(path) as file:
            if not is_dicom(file.read(HEAD_BYTES)):
                return AS_SEEN
            file.seek(0)
            import pydicom  # slow to import, and only DICOM needs it

            tags = ["ImageOrientationPatient"]
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
            values = [float(value) for value in header.get("ImageOrientationPatient") or ()]
    except ImageError:  # reading the image reports it
        return AS_SEEN
    if len(values) != 6 or not all(map(math.isfinite, values)):
        return AS_SEEN
    return (values[0], values[1], values[2]), (values[3], values[4], values[5])
