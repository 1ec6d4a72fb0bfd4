"""Which radiographs show the same patient, as far as DICOM files, names and pixels tell."""

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from guided_diffusion.images.files import IMAGE_EXTENSIONS, has_dicom_extension, open_file
from guided_diffusion.images.names import stem

# a part of the names that more images have in common is taken for a site, a class or a year
_MOST_IMAGES = 20
_FEWEST_WORDS = 3
_DATE = re.compile(r"(?<!\d)(19|20)\d\d[-_.]?(0[1-9]|1[0-2])[-_.]?(0[1-9]|[12]\d|3[01])(?!\d)")
_PATIENT = re.compile(
    r"(?<![a-z])(patient|participant|subject|person|case)[-_. ]*([a-z]{0,3}\d+|[a-z](?![a-z0-9]))"
)
# P001, sub-01: not after digits, where p2 may be a page
_SHORT = re.compile(r"(?:^|/)(?:[a-z]+[-_. ]+)*(subj|sub|pat|pt|pid|id|p)[-_. ]?(\d+)")
_SEPARATOR = r"[-_. ()\[\]]+"
_WORD = re.compile(rf"{_SEPARATOR}[a-z]{{1,12}}[)\]]*$|(?<=\d)[a-dlr]$")
_NUMBER = re.compile(rf"{_SEPARATOR}[a-z]{{0,12}}\d{{1,4}}[)\]]*$")
_VIEW = re.compile(rf"{_SEPARATOR}(left|right|[a-dlr]|ap|pa|lat|lateral|front|frontal|pre|post)$")
_NAME = re.compile(r"(?!train|val|test)([a-z][^\d]*?)[-_. ]+\d{1,4}")
_NOBODY = re.compile(r"anon\w*|unknown|none|n/?a|[0x\W]*|removed|de-?identified")


@dataclass(frozen=True)
class Patients:
    """groups: of each image, the index of the first image of the same patient.

    said: what tells them apart, as a sentence. known: whether anything does.
    """

    groups: list[int]
    said: str
    known: bool


def find_patients(names: Sequence[str], paths: Sequence[str]) -> Patients:
    """Group radiographs by patient; where nothing tells, each is a patient of its own.

    :param names: with sub-folders, without extensions.
    :param paths: of their files. PatientID and StudyInstanceUID count in DICOM files, and where
        every file has them, the names do not.
    """
    ids, studies = _dicom_keys(paths)
    named = all(ids)
    keys, source = [*ids, *studies], "DICOM's PatientID tells"
    if not named:
        by_name, named = _name_keys(names)
        keys, source = [*keys, *by_name], "the names tell"
    first: dict[str, int] = {}
    numbers = [*range(len(names))] * (len(keys) // max(1, len(names)))
    pairs = [(n, first.setdefault(key, n)) for n, key in zip(numbers, keys) if key]
    groups = merge(range(len(names)), pairs)
    sizes = Counter(groups)
    said = f"{source} {len(sizes)} patients of {len(names)} images"
    if len(sizes) < len(names):
        largest = sizes.most_common(1)[0][0]
        some = [name for name, group in zip(names, groups) if group == largest][:2]
        said += f" ({' and '.join(some)} are of one)"
    elif named:
        said += ", one each"
    else:
        said = (
            "warning: nothing tells which images are of one patient, so each counts as a patient"
            " of its own; if a patient has several, scores on VAL will be too high"
        )
    return Patients(groups, said, named or len(sizes) < len(names))


def merge(groups: Sequence[int], pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Join the groups of the two images of each pair."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    joined = [(groups[one], groups[other]) for one, other in pairs]
    rows, columns = np.array(joined, int).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(groups), len(groups)))
    labels = connected_components(graph, directed=False)[1]
    first: dict[int, int] = {}
    return [first.setdefault(labels[group], group) for group in groups]


def films_of(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Names for `find_patients`, below the folder that the files have in common, and the paths."""
    folders = [path.replace(os.sep, "/").split("/")[:-1] for path in paths]
    depths = (i for i, parts in enumerate(zip(*folders)) if len(set(parts)) > 1)
    depth = next(depths, min(map(len, folders)))
    return [("/".join(stem(path).split("/")[depth:]), path) for path in paths]


def shared_patients(
    one: Sequence[tuple[str, str]], other: Sequence[tuple[str, str]], digests: Sequence[str] = ()
) -> str:
    """Images of one patient on both sides, as a sentence; "" if none are known.

    :param one: names and paths of the images of one side.
    :param digests: of the pixels of all images, if known: copies count as well.
    """
    names, paths = zip(*one, *other)
    first: dict[str, int] = {}
    copies = [(n, first.setdefault(digest, n)) for n, digest in enumerate(digests)]
    groups = merge(find_patients(names, paths).groups, copies)
    films = [*zip(groups, paths)]
    return shared_groups(films[: len(one)], films[len(one) :])


def shared_groups(
    one: Sequence[tuple[Hashable, str]], other: Sequence[tuple[Hashable, str]]
) -> str:
    """As `shared_patients`, of groups and paths."""
    first, second = dict(reversed(one)), dict(reversed(other))
    groups = dict.fromkeys(group for group, _ in one if group in second)
    both = [f"{first[group]} and {second[group]}" for group in groups]
    if not both:
        return ""
    more = f", and so are {len(both) - 1} more pairs" if len(both) > 1 else ""
    return f"{both[0]} are of one patient or copies{more}"


def _dicom_keys(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of each image, keys for its PatientID and its StudyInstanceUID, "" where it has none."""
    found = [_read_ids(path) for path in paths]
    ids = ["" if _NOBODY.fullmatch(one.lower()) else f"PatientID {one}" for one, _ in found]
    if len(set(ids)) == 1:  # what a whole set shares is no one's
        ids = [""] * len(ids)
    return ids, [study and f"study {study}" for _, study in found]


def _read_ids(path: str) -> tuple[str, str]:
    if path.lower().endswith(IMAGE_EXTENSIONS) and not has_dicom_extension(path):
        return "", ""
    import pydicom

    tags = ["PatientID", "StudyInstanceUID"]
    try:
        with open_file(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
            patient, study = (str(header.get(tag) or "").strip() for tag in tags)
    except Exception:  # damaged in any way: reading the image reports it
        return "", ""
    return patient, study


def _name_keys(names: Sequence[str]) -> tuple[list[str], bool]:
    """Of each name, what tells the patient, "" for nothing; and whether all name one outright."""
    plain = [_DATE.sub("", name.lower()).strip("-_. ") for name in names]
    keys = [_outright(name) for name in plain]
    rest = [number for number, key in enumerate(keys) if not key]
    for rule, fewest in ((_folder, _FEWEST_WORDS), (_identifier, 2), (_word, _FEWEST_WORDS)):
        found = {number: rule(plain[number]) for number in rest}
        # two sides may each count from 1: equal names alone tell nothing
        sizes = Counter(key for _, key in {(names[n], key) for n, key in found.items() if key})
        if len(sizes) >= fewest and 1 < max(sizes.values()) <= _MOST_IMAGES:
            for number, key in found.items():
                keys[number] = key and f"{rule.__name__} {key}"
            break
    return keys, not rest


def _outright(name: str) -> str:
    if match := _PATIENT.search(name):
        return f"{match[1]} {match[2].lstrip('0')}"
    matches = [*_SHORT.finditer(name)]
    return f"{matches[-1][1]} {matches[-1][2].lstrip('0')}" if matches else ""


def _folder(name: str) -> str:
    return os.path.dirname(name)


def _identifier(name: str) -> str:
    """Without what follows a number: 0123_L, 0123b, AB12-2 and 7_film_3 become 0123, AB12 and 7."""
    name = _VIEW.sub("", name)
    numbers_left = 1
    while True:
        shorter = _WORD.sub("", name)
        if shorter == name and numbers_left:
            shorter, numbers_left = _NUMBER.sub("", name), 0
        if shorter == name or not any(c.isdigit() for c in shorter):
            return name
        name = shorter


def _word(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match[1] if match else ""
