"""What a reader returns, whatever the tool: classes, and what was drawn on each image."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Color = tuple[int, int, int]
Size = tuple[int, int]
"""Height and width, pixels."""


class Shape(Protocol):
    """Anything that covers pixels."""

    def draw(self, size: Size) -> np.ndarray:
        """The pixels covered, bool [H x W] of an image of this size.

        :raises UserError: if it cannot belong to an image of this size.
        """
        ...


@dataclass(frozen=True)
class Region:
    """One annotation.

    name   of its class, as the source spells it
    where  the file and the annotation, for messages
    """

    name: str
    where: str
    shape: Shape


@dataclass(frozen=True)
class ImageName:
    """The image of a drawing.

    name      path or file name that the source states; it may lie elsewhere now
    base      folder to which a path in `name` is relative
    title     what to call the image, without ending; "": by its file
    path      the file itself, where the source's layout tells it
    embedded  returns the content of an image file that the source holds
    convert   returns the image's values [H x W], of a file that cannot be used as it is
    """

    name: str
    base: str = ""
    title: str = ""
    path: str | None = None
    embedded: Callable[[], bytes] | None = None
    convert: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class Drawing:
    """What one person drew on one image.

    where      the file and the entry of the image, for messages
    size       of the image as the source states it
    regions    in drawing order: later ones lie on top
    annotator  who drew it, where the source tells
    """

    image: ImageName
    where: str
    regions: list[Region]
    size: Size | None = None
    annotator: str = ""


@dataclass(frozen=True)
class LeftOut:
    """Something that was not converted, and why."""

    what: str
    why: str


@dataclass
class Source:
    """The annotations of one file or folder.

    classes  colours by name, None where the source has none; in the source's order
    """

    drawings: list[Drawing] = field(default_factory=list)
    classes: dict[str, Color | None] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def add_class(self, name: str, color: Color | None = None) -> None:
        """List a class; a colour that is known already stays."""
        self.classes[name] = self.classes.get(name) or color

    def omit(self, what: str, why: str) -> None:
        """Note something that is not converted."""
        self.left_out.append(LeftOut(what, why))

    def join(self, other: "Source") -> None:
        """Add what another file holds."""
        self.drawings += other.drawings
        self.left_out += other.left_out
        for name, color in other.classes.items():
            self.add_class(name, color)


@dataclass(frozen=True)
class Options:
    """What readers need to be told.

    images      folder in which the images are searched for
    attribute   name of the attribute whose value is the class; "": the label, or the only attribute
    line_width  of lines that have no width of their own, pixels
    """

    images: str = ""
    attribute: str = ""
    line_width: float = 1.0
