"""Masks with all that makes export hard, and the radiographs that they belong to."""

import numpy as np
from images_util import write_dicom
from PIL import Image, ImageDraw
from scipy import ndimage

CLASSES = 5
FINE = 16  # cells of the independent rasteriser a pixel, an even number: centres are corners
UIDS = {
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.2",
}


def hard_mask(height=61, width=83, seed=0):
    """Class indices uint8 [H x W]: several parts, holes with parts within, single pixels, regions
    that touch by corners and at the border, thin slanted lines."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - 24, columns - 30)
    mask[distance < 20] = 1
    mask[distance < 13] = 0
    mask[distance < 6] = 2
    mask[24, 30] = 1
    mask[ndimage.gaussian_filter(rng.normal(size=mask.shape), 3) > 0.09] = 3
    mask[0, 0] = mask[-1, -1] = mask[-1, 0] = 2
    mask[-9:, 20:40] = 4
    mask[-5, 25] = mask[-3, 30] = mask[-4, 31] = 0
    mask[np.abs(rows - columns + 50) < 1] = 1
    mask[rng.random(mask.shape) > 0.97] = 4
    return mask


def write_radiographs(folder, masks):
    """IMG with a picture for each mask, by its name, and MASK."""
    for name, mask in masks.items():
        path = folder / "MASK" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
        path = folder / "IMG" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(40 * mask).save(path)


def write_dicom_radiograph(folder, name, mask, **elements):
    """A DICOM file whose instance segmentations can refer to."""
    folder.mkdir(parents=True, exist_ok=True)
    uids = {"SOPInstanceUID": f"1.2.826.0.1.3680043.8.498.9.{mask.sum()}", **UIDS}
    return write_dicom(folder, 40 * mask, name=f"{name}.dcm", **{**uids, **elements})


def iou(one, other):
    """Of two regions, bool [H x W]."""
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


def by_pillow(rings, height, width):
    """Whether the centres of pixels are inside: Pillow's polygons of 16 times the size."""
    inside = np.zeros((height, width), bool)
    for ring in rings:
        canvas = Image.new("1", (width * FINE, height * FINE))
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in ring * FINE - 0.5], fill=1, outline=0)
        inside ^= np.asarray(canvas)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    return inside
