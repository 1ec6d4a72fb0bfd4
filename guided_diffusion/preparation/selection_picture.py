"""A picture of a selection: each chosen radiograph beside some of those that it stands for."""

import dataclasses

import numpy as np
from PIL import Image

from guided_diffusion.images.files import evenly_spaced
from guided_diffusion.images.image_io import save_picture
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.segmentation.selection.medoids import Medoids
from guided_diffusion.segmentation.selection.pool import Pool

SIDE = 128
BESIDE = 8
MOST_ROWS = 50
_FRAME = 3


def write_picture(path: str, pool: Pool, medoids: Medoids, reading: ReadingConfig) -> None:
    """Write a row for each chosen radiograph, the first `MOST_ROWS` of them.

    It stands on the left, framed; then come others, from the nearest to the farthest.
    """
    reading = dataclasses.replace(reading, image_size=SIDE)
    tiles: list[np.ndarray] = []
    captions: list[str] = []
    for place, index in enumerate(medoids.chosen[:MOST_ROWS]):
        members = np.flatnonzero(medoids.nearest == place)
        members = members[members != index]
        members = members[np.argsort(medoids.distance[members], kind="stable")]
        tiles.append(_framed(reading.load(pool.paths[index])))
        captions.append(f"{place + 1}: stands for {len(members) + 1}")
        for other in evenly_spaced(members.tolist(), BESIDE):
            tiles.append(reading.load(pool.paths[other]))
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
