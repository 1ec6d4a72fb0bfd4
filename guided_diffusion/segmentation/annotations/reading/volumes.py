"""Pictures in NRRD and NIfTI files, turned as the radiograph is seen.

Both formats state the direction in which each axis of the array runs in the patient. A radiograph
without such a statement (PNG, most DICOM) counts as ITK, ITK-SNAP and 3D Slicer load it: columns
run to the left of the patient, rows to the back.
"""

import contextlib
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any

import numpy as np

from guided_diffusion.images.image_io import MAX_PIXELS
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.packages import need

ENDINGS = (".seg.nrrd", ".nrrd", ".nii.gz", ".nii")
# directions of columns and rows, towards left, posterior and superior of the patient
# the directions of the columns and of the rows, see `placement.Placement.axes`
Plane = tuple[tuple[float, ...], ...]
AS_SEEN: Plane = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))

_TYPES = {
    **{name: "i1" for name in ("signed char", "int8", "int8_t")},
    **{name: "u1" for name in ("uchar", "unsigned char", "uint8", "uint8_t")},
    **{name: "i2" for name in ("short", "short int", "signed short", "int16", "int16_t")},
    **{name: "u2" for name in ("ushort", "unsigned short", "uint16", "uint16_t")},
    **{name: "i4" for name in ("int", "signed int", "int32", "int32_t")},
    **{name: "u4" for name in ("uint", "unsigned int", "uint32", "uint32_t")},
    **{"float": "f4", "double": "f8"},
}
_TO_LPS = {"left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1)}
_TO_LPS |= {"right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1)}
_TO_LPS |= {"left-anterior-superior": (1, -1, 1), "las": (1, -1, 1)}
_ALIGNED = 0.7  # cosine from which two axes count as the same


@dataclass(frozen=True)
class Volume:
    """An array and the directions of its axes.

    values      the first axes are spatial, any layers of a segmentation stand last
    directions  [3] towards left, posterior, superior, of each spatial axis; None if unknown
    header      of NRRD
    """

    values: np.ndarray
    directions: np.ndarray | None
    header: Mapping[str, Any] = field(default_factory=dict)

    def layers(self, path: str, plane: Plane = AS_SEEN) -> np.ndarray:
        """The picture as a radiograph in this plane is seen: [layers x H x W].

        :raises UserError: if it has several slices or lies in another plane.
        """
        values = self.values
        spatial = min(values.ndim, 3)
        columns, rows, flip = 0, 1, (False, False)
        if self.directions is not None:
            cosines = np.abs(self.directions @ np.array(plane).T)
            choices = [(c, r) for c in range(spatial) for r in range(spatial) if c != r]
            columns, rows = max(choices, key=lambda pair: cosines[pair[0], 0] + cosines[pair[1], 1])
            if min(cosines[columns, 0], cosines[rows, 1]) < _ALIGNED:
                raise _other_plane(path)
            signs = (self.directions[columns] @ plane[0], self.directions[rows] @ plane[1])
            flip = (signs[0] < 0, signs[1] < 0)
        rest = [axis for axis in range(spatial) if axis not in (columns, rows)]
        if any(values.shape[axis] != 1 for axis in rest):
            if 1 in values.shape[:spatial]:
                raise _other_plane(path)
            raise UserError(
                f"{path} has {values.shape[rest[0]]} slices; radiographs have one: export the"
                " wanted one"
            )
        values = values.reshape(*values.shape[:spatial], -1)
        values = values.transpose(spatial, rows, columns, *rest)
        values = values.reshape(values.shape[:3])
        return values[:, :: -1 if flip[1] else 1, :: -1 if flip[0] else 1]


def _other_plane(path: str) -> UserError:
    return UserError(
        f"{path} does not lie in the plane of its radiograph: its axes point in other directions;"
        " export the segmentation in the geometry of the radiograph"
    )


def name_of(path: str) -> str:
    """The file's name without the ending of a volume; "" if it has none."""
    name = os.path.basename(path)
    end = next((end for end in ENDINGS if name.lower().endswith(end)), None)
    return name[: -len(end)] if end else ""


def read(path: str) -> Volume:
    """:raises UserError: naming the file, if it is damaged, too large, or of another kind."""
    try:
        if path.lower().endswith(".nrrd"):
            return _read_nrrd(path)
        return _read_nifti(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or 'damaged'}") from error
    except Exception as error:  # libraries raise anything about damaged files
        raise UserError(f"{path} is damaged, or no NRRD or NIfTI file; export it again") from error


def picture(path: str) -> np.ndarray:
    """The values of a volume that is a radiograph, [H x W]."""
    layers = read(path).layers(path)
    if len(layers) != 1:
        raise UserError(f"{path} has {len(layers)} layers; a radiograph has one")
    return layers[0]


@lru_cache(maxsize=2)
def read_kept(path: str) -> Volume:
    """`read`, which keeps the last files."""
    return read(path)


def _check_size(path: str, shape: "tuple[int, ...] | list[int]", most: int = MAX_PIXELS) -> None:
    total = 1
    for side in shape:
        total *= int(side)
    if not 2 <= len(shape) <= 4 or total > most or min(shape) < 1:
        sides = " x ".join(str(int(side)) for side in list(shape)[:6])
        raise UserError(
            f"{path} holds an array of {sides}; a picture has 2 or 3 axes and at most {most} pixels"
        )


def _read_nrrd(path: str) -> Volume:
    nrrd = need("nrrd", "pynrrd", "NRRD")
    with open(path, "rb") as file:
        header = nrrd.read_header(file)
        if any(key in header for key in ("data file", "datafile")):
            raise UserError(f"{path} only refers to its data; save it as one .nrrd file")
        shape = [int(side) for side in header["sizes"]]
        _check_size(path, shape)
        kind = np.dtype(_TYPES[header["type"]])
        if kind.itemsize > 1 and header.get("endian") == "big":
            kind = kind.newbyteorder(">")
        needed = int(np.prod(shape)) * kind.itemsize
        content = _content(file, str(header["encoding"]), needed, path)
    if len(content) < needed:
        raise UserError(f"{path} is truncated: {len(content)} of {needed} bytes; copy it again")
    values = np.frombuffer(content[:needed], kind).reshape(shape, order="F")
    found = header.get("space directions")
    listed: list[Any] = [None] * len(shape) if found is None else list(found)
    unknown = [row is None or not np.isfinite(row).all() for row in listed]
    if found is not None and len(shape) == 4:  # layers stand first
        if unknown != [True, False, False, False]:
            raise UserError(f"{path} has 4 axes that are not layers and slices; export it again")
        values, listed, unknown = np.moveaxis(values, 0, -1), listed[1:], unknown[1:]
    if any(unknown):
        return Volume(values, None, header)
    directions = np.zeros((len(listed), 3))
    for row, direction in zip(directions, listed):
        row[: len(direction)] = direction
    signs = _TO_LPS.get(str(header.get("space", "")).lower(), (1, 1, 1))
    return Volume(values, _units(directions * signs), header)


def _content(file: IO[bytes], encoding: str, needed: int, path: str) -> bytes:
    """The data of a NRRD file, inflated no further than needed."""
    if encoding == "raw":
        return file.read(needed)
    if encoding not in ("gzip", "gz"):
        raise UserError(f"{path} is encoded as {encoding[:20]!r}; save it raw or with gzip")
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(file.read(), needed)
    except zlib.error as error:
        raise UserError(f"{path} is damaged: its data do not unpack; copy it again") from error


def _read_nifti(path: str) -> Volume:
    nibabel = need("nibabel", "nibabel", "NIfTI")
    kinds = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    with _silent(nibabel.imageglobals.logger):
        image = next((kind for kind in kinds if kind.path_maybe_image(path)[0]), kinds[0])
        loaded = image.from_filename(path, mmap=False)
    shape = loaded.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    _check_size(path, shape)
    if len(shape) > 3:
        raise UserError(f"{path} has {len(shape)} axes; a picture has 2 or 3")
    values = np.asanyarray(loaded.dataobj).reshape(shape)
    if values.dtype.names:
        raise UserError(f"{path} holds colours; label maps hold one number per pixel")
    if not (loaded.header["sform_code"] or loaded.header["qform_code"]):
        return Volume(values, None)
    directions = (loaded.affine[:3, :3].T * (-1, -1, 1))[: len(shape)]
    return Volume(values, _units(directions))


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Discard what a library prints about headers that it mends."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _units(directions: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    if not np.isfinite(directions).all() or not (lengths > 0).all():
        raise ValueError("directions of axes are missing")
    return directions / lengths


def forget() -> None:
    """Release the files that are kept."""
    read_kept.cache_clear()
