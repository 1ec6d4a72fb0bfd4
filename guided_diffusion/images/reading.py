"""How images are read: one configuration, saved with the weights and applied ever after."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_diffusion.images.files import evenly_spaced
from guided_diffusion.images.geometry import KINDS, Geometry
from guided_diffusion.images.image_io import (
    INTENSITY_RULES,
    ImageError,
    Intensity,
    read_counted,
    read_image,
)
from guided_diffusion.runtime.command_line.flags import MOST, flag, from_mapping
from guided_diffusion.runtime.errors import UserError

if TYPE_CHECKING:
    import torch as th

# share of the range below which an image has fewer than 64 of 255 grey levels
_LOW_CONTRAST = 0.25


@dataclass(frozen=True)
class ReadingConfig:
    """How image files become arrays for the network; see `image_io.Intensity` for the rules."""

    TITLE = "Reading images"
    SECTION = "reading"

    image_size: int | tuple[int, int] = flag(
        64, "side of the input square, in pixels", type=int, least=1, most=2**16, basic=True
    )
    in_channels: int = flag(3, "1 (grey) or 3 (colour; grey images are repeated)", least=1, most=3)
    resize: str = flag(
        "crop",
        "how images are fitted to image_size; pad keeps all of them",
        choices=KINDS,
        basic=True,
    )
    intensity: str = flag(
        "full", "which grey levels become black and white", choices=INTENSITY_RULES
    )
    percentile_low: float = flag(
        0.5, "percentile of an image's pixels that becomes black", least=0, most=100
    )
    percentile_high: float = flag(
        99.5, "percentile of an image's pixels that becomes white", least=0, most=100
    )
    window_center: float | None = flag(
        None,
        "centre of the window, in the files' values; default: from each file",
        type=float,
        least=-MOST,
    )
    window_width: float | None = flag(
        None,
        "width of the window, in the files' values; default: from each file",
        type=float,
        above=0,
    )

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list):  # JSON has no tuples
            object.__setattr__(self, "image_size", tuple(self.image_size))
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sides) != 2 or not all(isinstance(s, int) and s >= 1 for s in sides):
            raise UserError(
                f"image_size {self.image_size} must be one or two whole numbers of pixels above 0"
            )
        if self.in_channels not in (1, 3):
            raise UserError(f"in_channels {self.in_channels} must be 1 (grey) or 3 (colour)")
        self.geometry()
        self.intensity_rule()

    def geometry(self) -> Geometry:
        """How images are fitted to the network's size."""
        return Geometry(self.resize, self.image_size)

    def intensity_rule(self) -> Intensity:
        """Which grey levels become black and white."""
        return Intensity(
            self.intensity,
            self.percentile_low,
            self.percentile_high,
            self.window_center,
            self.window_width,
        )

    def load(self, path: str) -> np.ndarray:
        """Read a file and resize it to the network's size: uint8 [H x W x C].

        :raises ImageError: if the file cannot be read.
        """
        return self.prepare(read_image(path, self.in_channels, self.intensity_rule()))

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resize what `read_image` returned to the network's size: uint8 [H x W x C].

        Rounding to 8 bits comes last, after the intensity rule and the resizing.
        """
        return to_uint8_channels(self.geometry().apply_image(image), self.in_channels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        plain = asdict(self)
        if isinstance(self.image_size, tuple):
            plain["image_size"] = list(self.image_size)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ReadingConfig":
        """Read what `to_dict` wrote.

        :raises UserError: for settings that do not exist, and values that they do not take.
        """
        if not isinstance(plain, dict):
            raise UserError("the reading configuration does not hold settings by name")
        unknown = sorted(
            str(key)[:40] for key in set(plain) - {field.name for field in fields(cls)}
        )
        if unknown:
            raise UserError(
                f"the reading configuration holds {', '.join(unknown)}, which are unknown: it was "
                "written by another version"
            )
        return from_mapping(cls, plain)


def to_uint8_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Convert [H x W] or [H x W x 3], uint8 or float in [0, 1], to uint8 [H x W x channels]."""
    if image.dtype != np.uint8:
        image = np.rint(image.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    if image.ndim == 2:
        image = image[..., None] if channels == 1 else np.repeat(image[..., None], channels, axis=2)
    return image


def normalize(images: "np.ndarray | th.Tensor") -> "th.Tensor":
    """Convert uint8 [... x H x W x C] to network input, float32 [... x C x H x W] in [-1, 1]."""
    import torch as th  # here, so that flags are parsed without it

    images = th.as_tensor(images).movedim(-1, -3)
    return images.to(th.float32, memory_format=th.contiguous_format).div_(127.5).sub_(1.0)


def low_contrast_advice(
    paths: Sequence[str], reading: ReadingConfig, how_many: int = 8
) -> str | None:
    """One line of advice if a sample of the images would be left with very few grey levels.

    This happens to 10-bit data in 16-bit files, and to CT, if the type's whole range is kept.
    """
    if reading.intensity != "full":
        return None
    spans = []
    for path in evenly_spaced(paths, how_many):
        try:
            image, counted = read_counted(path, 1)
        except ImageError:
            continue
        if image.dtype != np.uint8:
            spans.append(float(counted.max() - counted.min()))
    if not spans or np.median(spans) >= _LOW_CONTRAST:
        return None
    return (
        f"the images use {100 * np.median(spans):.2g} % of the range of their file type, "
        f"{max(1, round(255 * np.median(spans)))} of 255 grey levels; "
        "--intensity percentile uses all of them"
    )
