"""DICOM-SEG: a binary segmentation for each radiograph that refers to the radiograph's instance."""

import hashlib
import io
from typing import TYPE_CHECKING

import numpy as np

from guided_diffusion.images.dicom_file import parse, value_of
from guided_diffusion.images.image_io import MAX_PIXELS, ImageError, image_errors, open_image
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import write_atomically
from guided_diffusion.runtime.text import one_line
from guided_diffusion.segmentation.annotations.writing.labelled import Labelled
from guided_diffusion.segmentation.annotations.writing.writer import FileWriter
from guided_diffusion.segmentation.categories import Category, Code, SegmentCodes

if TYPE_CHECKING:
    import highdicom
    import pydicom

# of classes for which the class table has none
DEFAULT_CODES = SegmentCodes(Code("85756007", "SCT", "Tissue"), Code("85756007", "SCT", "Tissue"))
# what a segmentation copies from its radiograph, and a file may leave out or empty
_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_MAKER = "guided-diffusion"


class DicomSegWriter(FileWriter):
    ENDING = ".dcm"
    PACKAGES = ("highdicom",)

    def check(self, skip_unreadable: bool) -> None:
        for source in self.sources:
            try:
                read_source(source.path)
            except ImageError:
                if not skip_unreadable:
                    raise

    def add(self, labelled: Labelled) -> None:
        path, content = labelled.source.path, io.BytesIO()
        source = read_source(path)
        try:
            self._segmentation(source, labelled.mask).save_as(content)
        except (AttributeError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"no DICOM-SEG can refer to {path}: {one_line(error)}") from error
        write_atomically(self.path_of(labelled.source), lambda file: file.write(content.getvalue()))

    def _segmentation(
        self, source: "pydicom.Dataset", mask: np.ndarray
    ) -> "highdicom.seg.Segmentation":
        import highdicom

        return highdicom.seg.Segmentation(
            source_images=[source],
            pixel_array=self._numbered(mask)[None],
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                self._describe(number, label) for number, label in enumerate(self.labels, start=1)
            ],
            series_instance_uid=_uid("series", source, mask),
            sop_instance_uid=_uid("instance", source, mask),
            series_number=1,
            instance_number=1,
            manufacturer=_MAKER,
            manufacturer_model_name=_MAKER,
            software_versions=_version(),
            device_serial_number="0",
            omit_empty_frames=bool(mask.any()),  # of none it would warn, and keep all frames
            series_description="segmentation",
        )

    def _numbered(self, mask: np.ndarray) -> np.ndarray:
        """Segments are numbered from 1 in the order of the labels."""
        numbers = np.zeros(256, np.uint8)
        for number, label in enumerate(self.labels, start=1):
            numbers[label.index] = number
        return numbers[mask]

    def _describe(self, number: int, label: Category) -> "highdicom.seg.SegmentDescription":
        import highdicom
        from pydicom.sr.coding import Code as DicomCode

        codes = label.codes or DEFAULT_CODES
        kinds = highdicom.seg.SegmentAlgorithmTypeValues
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name=_MAKER,
            family=DicomCode("123109", "DCM", "Artificial Intelligence"),
            version=_version(),
        )
        return highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label.name[:64],
            segmented_property_category=DicomCode(*codes.category),
            segmented_property_type=DicomCode(*codes.type),
            algorithm_type=kinds.MANUAL if self.drawn else kinds.AUTOMATIC,
            algorithm_identification=None if self.drawn else algorithm,
            display_color=highdicom.color.CIELabColor.from_rgb(*label.color),
        )


def read_source(path: str) -> "pydicom.Dataset":
    """The data set of a radiograph that a segmentation can refer to.

    :raises UserError: if it is not DICOM, or does not say which instance it is.
    """
    missing = list(_REQUIRED)
    with image_errors(path):
        content = open_image(path)
        if isinstance(content, bytes):
            dataset = parse(content, MAX_PIXELS)
            missing = [key for key in _REQUIRED if value_of(dataset, key) is None]
    if not isinstance(content, bytes):
        raise UserError(
            f"{path} is not DICOM, and a DICOM-SEG refers to a DICOM file: choose another format"
        )
    if missing:
        raise UserError(
            f"{path} has no {missing[0]}, by which a DICOM-SEG would refer to it: choose another"
            " format"
        )
    for key in _MAY_BE_EMPTY:
        if key not in dataset:
            setattr(dataset, key, None)
    if "SliceThickness" not in dataset and "FrameOfReferenceUID" not in dataset:
        # a projection's: highdicom would copy it, and read no such sequence without a thickness
        dataset.pop("PixelSpacing", None)
    if value_of(dataset, "Modality") is None:
        dataset.Modality = "OT"
    return dataset


def _uid(what: str, source: "pydicom.Dataset", mask: np.ndarray) -> str:
    """The same for the same radiograph and mask."""
    from pydicom.uid import generate_uid

    content = hashlib.sha256(mask.tobytes()).hexdigest()
    return generate_uid(entropy_srcs=[_MAKER, what, str(source.SOPInstanceUID), content])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("guided-diffusion")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
