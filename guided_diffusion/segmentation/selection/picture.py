"""A picture of a selection: each chosen radiograph beside some of those that it stands for."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from guided_diffusion.images.files import evenly_spaced
from guided_diffusion.images.image_io import save_picture
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.segmentation.selection.medoids import Medoids

SIDE = 128
BESIDE = 8
MOST_ROWS = 50
_FRAME = 3


def write_picture(
    path: str,
    paths: Sequence[str],
    medoids: Medoids,
    reading: ReadingConfig,
    notes: Sequence[str] = (),
) -> None:
    """Write a row for each chosen radiograph, the first `MOST_ROWS` of them.

    It stands on the left, framed; then come others, from the nearest to the farthest.

    :param paths: of the radiographs, by their numbers in `medoids`.
    :param notes: for the captions of the chosen ones, in their order.
    """
    resize = "pad" if reading.resize == "native" else reading.resize
    reading = dataclasses.replace(reading, image_size=SIDE, resize=resize)
    tiles: list[np.ndarray] = []
    captions: list[str] = []
    for place, index in enumerate(medoids.chosen[:MOST_ROWS]):
        members = np.flatnonzero(medoids.nearest == place)
        members = members[members != index]
        members = members[np.argsort(medoids.distance[members], kind="stable")]
        tiles.append(_framed(reading.load(paths[index])))
        note = f"{notes[place]}, " if notes else ""
        captions.append(f"{place + 1}: {note}stands for {len(members) + 1}")
        for other in evenly_spaced(members.tolist(), BESIDE):
            tiles.append(reading.load(paths[other]))
            captions.append(f"distance {medoids.distance[other]:.3g}")
        missing = (place + 1) * (1 + BESIDE) - len(tiles)
        tiles += [np.zeros_like(tiles[0])] * missing
        captions += [""] * missing
    save_picture(path, Image.fromarray(image_grid(np.stack(tiles), captions, 1 + BESIDE)))


def _framed(image: np.ndarray) -> np.ndarray:
    framed = np.full_like(image, 255)
    inside = np.s_[_FRAME:-_FRAME, _FRAME:-_FRAME]
    framed[inside] = image[inside]
    return framed
