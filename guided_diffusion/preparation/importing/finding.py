"""Images that annotations name, found in a folder wherever they lie there now."""

import os
import re
from collections.abc import Sequence

from guided_diffusion.images.files import list_images
from guided_diffusion.images.names import composed, stem
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading.label_studio import original_name
from guided_diffusion.segmentation.annotations.reading.node import short

_DRIVE = re.compile(r"[A-Za-z]:")


class ImageFinder:
    """Finds images by the names that annotations state, below one folder and never outside it.

    Folders in a name help where several files have the same name; `..`, drives and the root of the
    file system do not count.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._by_name: dict[str, list[list[str]]] | None = None
        self._paths: dict[tuple[str, ...], str] = {}

    def find(self, name: str, base: str, where: str) -> str | None:
        """The path of an image; None if there is none.

        :param base: folder to which the name may be relative.
        :param where: the entry of the image, for messages.
        :raises UserError: if several files fit equally well.
        """
        exact = self._exact(name, base)
        if exact:
            return exact
        parts = _parts(name)
        for wanted in (parts, _parts(original_name("/".join(parts)))):
            best = self._best(wanted)
            if len(best) > 1:  # the folder of the annotations may be called as that of the image
                best = self._best([*_parts(base), *wanted])
            if len(best) > 1:
                raise UserError(
                    f"{where}: its image {short(name)} could be {' or '.join(best[:3])}; name the"
                    " folder of the images with --images"
                )
            if best:
                return best[0]
        return None

    def _exact(self, name: str, base: str) -> str | None:
        """The image where the name says it is, if that is in the folder."""
        self._index()
        for start in (base or ".", self.folder):
            place = os.path.join(os.path.abspath(start), name.replace("\\", "/"))
            inside = os.path.relpath(os.path.normpath(place), os.path.abspath(self.folder))
            if inside.split(os.sep)[0] != ".." and (path := self._paths.get(_key(inside))):
                return path
        return None

    def _best(self, wanted: list[str]) -> list[str]:
        """The files with the most folders in common, from the end of the path."""
        if not wanted:
            return []
        by_name = self._index()
        found = by_name.get(wanted[-1]) or by_name.get(stem(wanted[-1])) or []
        shared = [_shared(wanted, parts) for parts in found]
        most = max(shared, default=0)
        return [self._paths[tuple(parts)] for parts, count in zip(found, shared) if count == most]

    def _index(self) -> dict[str, list[list[str]]]:
        """The parts of the path of every image, by file name, and by its name without ending."""
        if self._by_name is None:
            self._by_name = {}
            for path in _listed(self.folder):
                parts = _parts(os.path.relpath(path, self.folder))
                self._paths[tuple(parts)] = path
                for key in {parts[-1], stem(parts[-1])}:
                    self._by_name.setdefault(key, []).append(parts)
        return self._by_name


def _listed(folder: str) -> list[str]:
    try:
        return list_images(folder)
    except UserError:  # none: what needs one will say so
        return []


def _key(path: str) -> tuple[str, ...]:
    return tuple(_parts(path))


def _parts(name: str) -> list[str]:
    plain = _DRIVE.sub("", composed(name).replace("\\", "/"), count=1)
    return [part for part in plain.split("/") if part not in ("", ".", "..")]


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts two paths share, from the end; at least 1, as the names fit."""
    pairs = zip(reversed(one[:-1]), reversed(other[:-1]))
    count = 1
    for first, second in pairs:
        if first != second:
            break
        count += 1
    return count
