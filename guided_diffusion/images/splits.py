"""The parts of a data set, as folders are called: to learn from, and to measure on."""

import os
from collections.abc import Sequence

from guided_diffusion.images.files import list_radiographs, name_images
from guided_diffusion.images.left_out import IMAGE_FOLDERS
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import expand_path, is_local

SPLITS = {
    **{"train": "TRAIN", "training": "TRAIN"},
    **{"val": "VAL", "valid": "VAL", "validation": "VAL"},
    **{"test": "TEST", "testing": "TEST"},
}


def list_labelled(folder: str) -> list[tuple[str, str]]:
    """Name and file of each radiograph in a folder of labelled ones: in its IMG, if it has one.

    :raises UserError: if there are none.
    """
    folder = expand_path(folder)
    inside = sorted(os.listdir(folder)) if is_local(folder) and os.path.isdir(folder) else []
    for name in inside:
        if name.lower() in IMAGE_FOLDERS and os.path.isdir(os.path.join(folder, name)):
            folder = os.path.join(folder, name)
            break
    paths, _ = list_radiographs(folder)
    return list(zip(name_images(folder, paths), paths))


def list_held_out(folder: str, avoid: Sequence[str], flag: str) -> list[tuple[str, str]]:
    """Name and file of each radiograph that must not be learnt from.

    :param folder: what is learnt from; "" for none.
    :param avoid: folders of radiographs; (): VAL and TEST beside `folder`.
    :param flag: that named `folder`, for messages.
    :raises UserError: if one of them is `folder`, or holds no radiographs.
    """
    if not avoid and os.path.isdir(folder):
        beside = os.path.dirname(os.path.abspath(folder))
        shown = os.path.dirname(os.path.normpath(folder))
        names = [n for n in sorted(os.listdir(beside)) if SPLITS.get(n.lower()) in ("VAL", "TEST")]
        avoid = [os.path.join(shown, n) for n in names if os.path.isdir(os.path.join(beside, n))]
        avoid = [one for one in avoid if os.path.realpath(one) != os.path.realpath(folder)]
    for one in avoid:
        if os.path.realpath(one) == os.path.realpath(folder):
            raise UserError(f"--avoid {one} is the folder that {flag} names")
    return [film for one in avoid for film in list_labelled(one)]
