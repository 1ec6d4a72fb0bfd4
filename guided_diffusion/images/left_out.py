"""Images that are not radiographs: masks, and pictures that commands of this project wrote.

Many data sets keep masks in or beside the folder of the radiographs, and many results are written
there. Names tell them apart; masks are left out only where there are radiographs beside them.
"""

import os
import re
from collections.abc import Sequence

from guided_diffusion.images.names import stem

# what files are that are not radiographs
RESULT, IN_FOLDER, BY_SUFFIX = "results", "in folders of masks", "with the suffix of a mask"
IMAGE_FOLDERS = ("img", "imgs", "image", "images")
MASK_FOLDERS = (
    *("mask", "masks", "label", "labels", "annotation", "annotations", "gt", "seg"),
    *("segmentation", "segmentations", "ground_truth", "groundtruth"),
)
# the folders that predict.py fills
RESULT_FOLDERS = ("MASK", "COLOR", "OVERLAY", "UNCERTAINTY", "PROBABILITIES")
# the folder for files of annotation tools, beside them
EXPORT_FOLDER = "EXPORT"
# the folder for radiographs to correct next
LABEL_NEXT_FOLDER = "LABEL_NEXT"
_FILLED = (*RESULT_FOLDERS, EXPORT_FOLDER, LABEL_NEXT_FOLDER)
# pictures that other commands write, and the files beside them that tell that they did
_PICTURES = (
    (re.compile(r"((samples|process)_\d+|curves)\.(png|gif)"), ("progress.csv", "log.txt")),
    (
        re.compile(r"(confusion|reliability|uncertainty_deciles|where|worst)\.png"),
        ("metrics.json",),
    ),
)
# names of folders of masks in many data sets: train_masks, leftMask, labelsTr, SegmentationClass
_MASK_FOLDER = re.compile(
    r"(?!(no|un|without)[_\-. ]?(mask|label|annot|seg))(.*mask.*|labelst[rs]|(.+[_\-. ])?(labels?"
    r"|gt|segs?|annotations?|segmentations?\w*|ground[_\-. ]?truths?|truths?|manual\w*))",
    re.IGNORECASE,
)
# those of MASK_SUFFIXES, and others that tell no mask where masks are wanted
_MASK_SUFFIX = re.compile(
    r"(.+)[_\-. ](masks?|gt|segs?|segm|segmentations?|labels?|annotations?|ground_?truth)",
    re.IGNORECASE,
)


def left_out(names: Sequence[str], base: str) -> dict[str, str]:
    """The images that are not radiographs: what they are, by name.

    :param names: all images of a folder, by their paths below it, with slashes.
    :param base: that folder.
    """
    results = [name for name in names if _is_result(name, base)] + _predictions(names)
    found = dict.fromkeys(results, RESULT)
    rest = [name for name in names if name not in found]
    stems = {stem(name) for name in rest}
    place_of = {name: _mask_folder(name) for name in rest}
    with_radiographs = {
        "/".join(name.split("/")[:depth])
        for name, place in place_of.items()
        if place is None
        for depth in range(name.count("/") + 1)
    }
    for name, place in place_of.items():
        suffixed = _MASK_SUFFIX.fullmatch(stem(name))
        if place in with_radiographs:
            found[name] = IN_FOLDER
        elif suffixed and suffixed[1] in stems:
            found[name] = BY_SUFFIX
    return found


def summary(found: dict[str, str]) -> str:
    """What was left out, in a line; "" for nothing."""
    parts = []
    for kind in sorted(set(found.values())):
        names = [name for name in found if found[name] == kind]
        parts.append(f"{len(names)} {kind}, such as {names[0]}")
    return f"left out, as they are not radiographs: {'; '.join(parts)}" if parts else ""


def _mask_folder(name: str) -> str | None:
    """The folder that holds the first folder of masks on the way to an image; None if none does."""
    folders = name.split("/")[:-1]
    for depth, folder in enumerate(folders):
        if _MASK_FOLDER.fullmatch(folder):
            return "/".join(folders[:depth])
    return None


def _predictions(names: Sequence[str]) -> list[str]:
    """The pictures in folders that predict.py filled: MASK, with OVERLAY beside it."""
    folders: dict[str, set[str]] = {}
    places = []
    for name in names:
        parts = name.split("/")
        depth = next((i for i, part in enumerate(parts[:-1]) if part in _FILLED), None)
        if depth is not None:
            place = "/".join(parts[:depth])
            folders.setdefault(place, set()).add(parts[depth])
            places.append((name, place))
    return [name for name, place in places if {"MASK", "OVERLAY"} <= folders[place]]


def _is_result(name: str, base: str) -> bool:
    folder, _, file = name.rpartition("/")
    return any(
        pattern.fullmatch(file)
        and any(os.path.exists(os.path.join(base, folder, table)) for table in tables)
        for pattern, tables in _PICTURES
    )
