"""A radiograph and its mask, as writers of annotation files get them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.names import composed
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.text import visible
from guided_diffusion.segmentation.annotations.polygons import Part, trace_parts
from guided_diffusion.segmentation.categories import Category, ClassTable


class Source(Protocol):
    """A radiograph: its file, and its name in the results (with its sub-folder)."""

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str: ...


class Shape(NamedTuple):
    """A part of a class."""

    label: Category
    part: Part


@dataclass(frozen=True)
class Labelled:
    """A radiograph with its mask.

    mask: class indices uint8 [H x W], IGNORE where pixels have no label. shapes: of all labels,
    from the largest to the smallest, [] unless a format needs them.
    """

    source: Source
    mask: np.ndarray
    shapes: Sequence[Shape] = ()


def labels_of(table: Sequence[Category]) -> tuple[Category, ...]:
    """What is exported, by its value in masks: all classes but the background, and IGNORE if the
    table has a name for it."""
    ignored = table.ignored[:1] if isinstance(table, ClassTable) else ()
    return (*table[1:], *(replace(category, index=IGNORE) for category in ignored))


def trace_shapes(mask: np.ndarray, labels: Sequence[Category], tolerance: float) -> list[Shape]:
    """The parts of all labels, from the largest to the smallest: where a reader lets later ones
    cover earlier ones, none is lost."""
    shown = set(np.unique(mask).tolist())
    shapes = [
        Shape(label, part)
        for label in labels
        if label.index in shown
        for part in trace_parts(mask == label.index, tolerance)
    ]
    return sorted(shapes, key=lambda shape: -shape.part.area)


def file_name(source: Source) -> str:
    """The radiograph's file below the folder that was searched, a path with slashes."""
    folder = source.name.rpartition("/")[0]
    name = composed(os.path.basename(source.path))
    return f"{folder}/{name}" if folder else name


def check_text_names(sources: Sequence[Source], what: str) -> None:
    """:raises UserError: if a file's name cannot be written in a text file."""
    for source in sources:
        name = file_name(source)
        if not name.isprintable() or visible(name) != name:
            raise UserError(
                f"{source.path}: {what} cannot hold this name; rename the file or folder"
            )
