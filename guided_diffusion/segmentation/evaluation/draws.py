"""Which labelled images a run sees: draws of the seed, and folds of cross-validation."""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import blobfile as bf
import numpy as np

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.names import ending
from guided_diffusion.images.patients import find_patients
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.files import writing


@dataclass(frozen=True)
class Pairs:
    """Folders of radiographs and of masks, and the names of the files in them."""

    images: str
    masks: str
    names: tuple[str, ...]


def find_pairs(images: str, masks: str) -> Pairs:
    """The pairs in two folders."""
    return Pairs(images, masks, tuple(name for name, *_ in pair_files(images, masks)))


def draw(names: Sequence[str], k: int, seed: int) -> list[str]:
    """Draw k of the names; fewer with the same seed are the first of these."""
    generator = np.random.default_rng(rng.derive_seed(seed, "labelled images"))
    return [names[i] for i in generator.permutation(len(names))[:k]]


def find_films(pairs: Pairs) -> list[tuple[str, str]]:
    """Name and file of each radiograph."""
    return [(name, image) for name, image, _ in pair_files(pairs.images, pairs.masks)]


def split_patients(pairs: Pairs, folds: int) -> list[list[str]]:
    """`split_folds` of the pairs, saying how their patients were found."""
    patients = find_patients(*zip(*find_films(pairs)))
    say(patients.said)
    return split_folds(pairs.names, folds, patients.groups)


def split_folds(
    names: Sequence[str], folds: int, patients: Sequence[Hashable] = ()
) -> list[list[str]]:
    """Divide the names into `folds` parts, of which no two have a patient in common.

    :param patients: of the names; () if each is one of its own, so that sizes differ by at most 1.
    :raises UserError: for fewer patients than folds.
    """
    members: dict[Hashable, list[str]] = {}
    for name, patient in zip(names, patients or names):
        members.setdefault(patient, []).append(name)
    if len(members) < folds:
        raise UserError(f"--folds {folds}: the images are of {len(members)} patients")
    groups = [*members.values()]
    parts: list[list[str]] = [[] for _ in range(folds)]
    for number in np.random.default_rng(rng.derive_seed(0, "folds")).permutation(len(groups)):
        min(parts, key=len).extend(groups[number])
    return [sorted(part) for part in parts]


def fold_folders(folds: Sequence[Sequence[str]], output: str) -> list[Pairs]:
    """Folders under `output` for copies of each fold, so that commands can name them."""
    folders = [os.path.join(output, "folds", str(number)) for number in range(len(folds))]
    return [
        Pairs(os.path.join(folder, "IMG"), os.path.join(folder, "MASK"), tuple(names))
        for folder, names in zip(folders, folds)
    ]


def copy_folds(pairs: Pairs, folds: Sequence[Pairs]) -> None:
    """Fill the folders of the folds, and remove from them what an earlier command left."""
    files = {name: paths for name, *paths in pair_files(pairs.images, pairs.masks)}
    for fold in folds:
        for number, folder in enumerate((fold.images, fold.masks)):
            copies = {}
            for name in fold.names:
                source = files[name][number]
                copies[os.path.join(folder, name + ending(source))] = source
            with writing(folder):
                for path in find_files(folder) - copies.keys():
                    os.remove(path)
                for path, source in copies.items():
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    bf.copy(source, path, overwrite=True)


def find_files(folder: str) -> set[str]:
    """All files below a folder."""
    return {os.path.join(top, name) for top, _, names in os.walk(folder) for name in names}
