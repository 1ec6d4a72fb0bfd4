"""Which tool wrote a file or folder, by its content."""

import os
from dataclasses import replace
from types import ModuleType

from guided_diffusion.images.names import is_ignored
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.annotations.reading import (
    coco,
    cvat,
    dicom_seg,
    label_studio,
    labelme,
    nnunet,
    node,
    slicer,
    via,
    volumes,
    yolo,
)
from guided_diffusion.segmentation.annotations.reading.source import Options, Source

# formats of files, of which a folder may hold several; and formats of whole folders
OF_FILES: dict[str, ModuleType] = {
    "coco": coco,
    "labelme": labelme,
    "cvat": cvat,
    "labelstudio": label_studio,
    "via": via,
}
OF_FOLDERS: dict[str, ModuleType] = {
    "nnunet": nnunet,
    "yolo": yolo,
    "slicer": slicer,
    "dicomseg": dicom_seg,
}
FORMATS = {**OF_FILES, **OF_FOLDERS}


def recognise(source: str) -> tuple[str, list[str]]:
    """The format of a file or folder, "" if it is of none; and its files, or the folder itself.

    :raises UserError: if it holds files of several formats.
    """
    if os.path.isdir(source) and nnunet.recognises(source):
        return "nnunet", [source]
    found: dict[str, list[str]] = {}
    unreadable: list[UserError] = []
    for path in _files(source):
        try:
            name = next((n for n, f in OF_FILES.items() if _is_of(f, path)), "")
        except UserError as error:
            unreadable.append(error)
            continue
        if name:
            found.setdefault(name, []).append(path)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UserError(
            f"{source} holds annotations of {FORMATS[one].TITLE} ({first[0]}) and of"
            f" {FORMATS[other].TITLE} ({second[0]}); choose one with --format"
        )
    if found:
        if unreadable:
            raise unreadable[0]
        return next(iter(found.items()))
    for name in ("yolo", "slicer", "dicomseg"):
        if FORMATS[name].recognises(source):
            return name, [source]
    if unreadable:
        raise unreadable[0]
    return "", []


def files_of(source: str, name: str) -> list[str]:
    """The files of a format that was named, or the folder itself.

    :raises UserError: if there are none.
    """
    if name in OF_FOLDERS:
        return [source]
    endings = OF_FILES[name].ENDINGS
    if not os.path.isdir(source):
        return [source]
    candidates = [path for path in _files(source) if path.lower().endswith(endings)]
    found = [path for path in candidates if OF_FILES[name].recognises(path)]
    if not found:
        raise UserError(
            f"{source} holds no annotations of {OF_FILES[name].TITLE}, files that end in"
            f" {' or '.join(endings)}; name another folder or --format"
        )
    return found


def others(source: str, paths: list[str]) -> list[str]:
    """Files in the source that might hold annotations, but are not among those that do."""
    known = set(paths)
    return [] if source in known else [path for path in _files(source) if path not in known]


def read(name: str, paths: list[str], options: Options) -> Source:
    """All annotations in the files.

    :raises UserError: naming the file and the annotation that is not as it must be.
    """
    joined = Source()
    for path in paths:
        found = FORMATS[name].read(path, options)
        base = path if os.path.isdir(path) else os.path.dirname(path)
        found.drawings = [replace(d, image=replace(d.image, base=base)) for d in found.drawings]
        joined.join(found)
    return joined


def forget() -> None:
    """Release files that were kept while they were read."""
    for module in (node, cvat, volumes, dicom_seg):
        module.forget()


def _is_of(module: ModuleType, path: str) -> bool:
    return path.lower().endswith(module.ENDINGS) and bool(module.recognises(path))


def _files(source: str) -> list[str]:
    """The files that may hold annotations, by name."""
    if not os.path.isdir(source):
        return [source]
    endings = tuple({end for module in OF_FILES.values() for end in module.ENDINGS})
    found = []
    for root, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        found += [
            os.path.join(root, name)
            for name in sorted(names)
            if name.lower().endswith(endings) and not is_ignored(name)
        ]
    return found
