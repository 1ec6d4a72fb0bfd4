"""Masks to files of annotation tools, in several formats at once."""

import importlib
import os
from collections.abc import Sequence

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import check_outputs
from guided_diffusion.segmentation.annotations.reading.packages import need
from guided_diffusion.segmentation.annotations.writing.labelled import (
    Labelled,
    Source,
    labels_of,
    trace_shapes,
)
from guided_diffusion.segmentation.annotations.writing.writer import Writer
from guided_diffusion.segmentation.categories import Category

_HERE = __package__
_DISTRIBUTIONS = {"nrrd": "pynrrd"}  # where the name of a package is not that of its module
WRITERS = {
    "coco": (f"{_HERE}.coco", "CocoWriter"),
    "labelme": (f"{_HERE}.labelme", "LabelMeWriter"),
    "cvat": (f"{_HERE}.cvat", "CvatWriter"),
    "dicomseg": (f"{_HERE}.dicomseg", "DicomSegWriter"),
    "nifti": (f"{_HERE}.labelmaps", "NiftiWriter"),
    "nrrd": (f"{_HERE}.labelmaps", "NrrdWriter"),
}


class Export:
    """Writes the masks of radiographs into a folder for each format.

    :param folder: for the formats' folders.
    :param formats: keys of WRITERS; with () nothing happens.
    :param sources: the radiographs.
    :param table: the classes.
    :param tolerance: of polygons, pixels.
    :param drawn: whether people drew the masks, rather than a network.
    :param skip_unreadable: radiographs that cannot be read will not be added.
    :raises UserError: before anything is written, if a package is missing, a format cannot hold a
        radiograph, or a file exists or cannot be written.
    """

    def __init__(
        self,
        folder: str,
        formats: Sequence[str],
        sources: Sequence[Source],
        table: Sequence[Category],
        tolerance: float = 0.5,
        drawn: bool = False,
        skip_unreadable: bool = False,
    ):
        self.labels, self.tolerance = labels_of(table), tolerance
        self.writers: list[Writer] = []
        for name in formats:
            module, kind = WRITERS[name]
            writer = getattr(importlib.import_module(module), kind)
            for package in writer.PACKAGES:
                need(package, _DISTRIBUTIONS.get(package, package), name)
            self.writers.append(writer(os.path.join(folder, name), sources, self.labels, drawn))
        for writer in self.writers:
            writer.check(skip_unreadable)
        paths = [path for writer in self.writers for path in writer.paths()]
        _check_new(paths)
        if paths:
            check_outputs(paths)

    def add(self, source: Source, mask: np.ndarray) -> None:
        """Write a radiograph's mask; threads may do so at once.

        :param mask: class indices uint8 [H x W] at the radiograph's own size, IGNORE where pixels
            have no label.
        """
        shapes = (
            trace_shapes(mask, self.labels, self.tolerance)
            if any(writer.TRACES for writer in self.writers)
            else []
        )
        for writer in self.writers:
            writer.add(Labelled(source, mask, shapes))

    def close(self) -> None:
        """Write the files that list all radiographs."""
        for writer in self.writers:
            writer.close()


def _check_new(paths: Sequence[str]) -> None:
    existing = [path for path in paths if os.path.lexists(path)]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise UserError(
            f"{existing[0]}{more} exists already and may hold corrections: choose another folder,"
            " or remove it"
        )
