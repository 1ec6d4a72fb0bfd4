"""Dividing a data set into TRAIN and VAL: no patient in both, every class in TRAIN."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guided_diffusion.images.duplicates import find_duplicates, fingerprint
from guided_diffusion.images.groups import read_groups
from guided_diffusion.images.image_io import ImageError, read_image
from guided_diffusion.images.masks import black_and_white, mask_values
from guided_diffusion.images.patients import find_patients, merge, shared_groups
from guided_diffusion.preparation.layouts import Item, copy_pair
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import track
from guided_diffusion.runtime.storage.files import write_csv

TRIES = 64


@dataclass(frozen=True)
class Placed:
    """An item, its split and its group (patient)."""

    item: Item
    split: str
    group: str = ""


def place(
    items: Sequence[Item], wanted: int | float, rule: str, seed: int
) -> tuple[list[Placed], list[str]]:
    """Divide into TRAIN and VAL; what is in TEST stays there.

    :param wanted: images for TRAIN: an int is their number, a float their share.
    :param rule: how to identify the patient, see `read_groups`; "": see `find_patients`.
    :return: also what to tell the user about patients.
    """
    free = [item for item in items if item.split != "TEST"]
    items = [*free, *(item for item in items if item.split == "TEST")]
    groups, notes = group_images(items, rule)
    number = wanted if isinstance(wanted, int) else max(1, round(wanted * len(free)))
    train = divide(groups[: len(free)], _classes_in(free), number, seed)
    splits = ["TRAIN" if chosen else "VAL" for chosen in train]
    splits += ["TEST"] * (len(items) - len(free))
    placed = [Placed(*row) for row in zip(items, splits, groups)]
    return placed, [*notes, *leaks(placed)]


def keep(items: Sequence[Item]) -> tuple[list[Placed], list[str]]:
    """The split that the items have; and what to tell the user about patients in several parts."""
    groups, notes = group_images(items, "")
    placed = [Placed(item, item.split or "TRAIN", group) for item, group in zip(items, groups)]
    return placed, [*(note for note in notes if note.startswith("warning")), *leaks(placed)]


def by_patient(items: Sequence[Item]) -> list[Placed]:
    """The items in the split that they have, with their patients for groups."""
    patients = find_patients([item.stem for item in items], [item.image for item in items])
    return [Placed(item, item.split, str(g)) for item, g in zip(items, patients.groups)]


def leaks(placed: Sequence[Placed]) -> list[str]:
    """A line for each two splits that have a group in common."""
    lines = []
    for one, other in (("TRAIN", "VAL"), ("TRAIN", "TEST"), ("VAL", "TEST")):
        sides = [[p for p in placed if p.split == split] for split in (one, other)]
        films = [[(p.group, p.item.image) for p in side] for side in sides]
        if shared := shared_groups(*films):
            lines.append(f"warning: {one} and {other} are not independent: {shared}")
    return lines


def group_images(items: Sequence[Item], rule: str) -> tuple[list[str], list[str]]:
    """Of each item, a name for what stays on one side; and what to tell the user about patients."""
    if rule:
        names, notes = _by_rule(items, rule), []
        first: dict[str, int] = {}
        groups = [first.setdefault(name, number) for number, name in enumerate(names)]
    else:
        names = [item.name for item in items]
        patients = find_patients([item.stem for item in items], [item.image for item in items])
        groups = patients.groups
        notes = [f"{patients.said}; --group states it yourself"]
        if len(set(groups)) == 1:  # of one patient, so nothing can be kept apart
            groups = list(range(len(items)))
            notes = [f"warning: all images seem to be of one patient, on both sides; {notes[0]}"]
    prints = [fingerprint(read_image(item.image)) for item in track(items, "comparing")]
    found = list(find_duplicates(prints))
    for exact, kind in ((True, "the same pixels as"), (False, "almost the same pixels as")):
        pairs = [(later, first) for later, first, same in found if same == exact]
        merged = merge(groups, pairs)
        if 2 * len(set(merged)) < len(set(groups)):  # most look alike: not copies
            notes.append(f"warning: {len(pairs)} of {len(items)} images have {kind} others")
        elif pairs:
            groups = merged
            later, earlier = (items[number].image for number in pairs[0])
            notes.append(f"{later} has {kind} {earlier}, {len(pairs)} in all: kept together")
    return [names[group] for group in groups], notes


def _by_rule(items: Sequence[Item], rule: str) -> list[str]:
    """The groups of the items; of TEST, where the rule does not cover it, their names."""
    try:
        return read_groups([item.stem for item in items], rule)
    except UserError:
        free = [item.stem for item in items if item.split != "TEST"]
        test = [item.name for item in items if item.split == "TEST"]
        return [*read_groups(free, rule), *test]


def write_split(placed: Sequence[Placed], folder: str) -> str:
    """Copy the files to FOLDER/TRAIN/IMG and so on, and list them in FOLDER/split.csv.

    :return: the path of the list.
    :raises UserError: if two files would have the same name, before anything is written.
    """
    taken: dict[tuple[str, str], str] = {}
    for one in placed:
        if one.item.mask is None:
            raise UserError(f"{one.item.image} has no mask; give --mask-dir or --source-dir")
        other = taken.setdefault((one.split, one.item.stem), one.item.image)
        if other != one.item.image:
            raise UserError(
                f"{other} and {one.item.image} would both be {one.split}/{one.item.stem}; "
                "rename one"
            )
    for one in track(placed, "copying"):
        copy_pair(one.item, folder, split=one.split)
    rows = sorted((one.item.stem, one.split, one.group) for one in placed)
    path = os.path.join(folder, "split.csv")
    write_csv(path, ("name", "split", "group"), rows)
    return path


def _classes_in(items: Sequence[Item]) -> np.ndarray:
    """Whether each image shows each class: bool [N x 256]."""
    classes = np.zeros((len(items), 256), bool)
    for row, item in zip(classes, track(items, "reading")):
        if item.mask is None:
            raise UserError(f"{item.image} has no mask; give --mask-dir or --source-dir")
        try:
            values, lossy = mask_values(item.mask)
            white = black_and_white(values, lossy)
            row[np.unique(values if white is None else white).clip(0, 255).astype(int)] = True
        except ImageError as error:
            raise UserError(f"{error}; see --action validate") from error
    return classes


def divide(groups: Sequence[str], classes: np.ndarray, num_train: int, seed: int) -> np.ndarray:
    """Choose TRAIN: whole groups of `num_train` images, or fewer if the groups require it.

    The best of several random draws: as many classes as possible in TRAIN, then as many images,
    then as many classes as possible in VAL.

    :param groups: N names.
    :param classes: whether image n shows class c, bool [N x C].
    :return: bool [N].
    :raises UserError: if one side would be empty.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(member)
    holds = np.zeros((len(names), classes.shape[1]), bool)
    np.logical_or.at(holds, member, classes)
    if len(names) < 2:
        raise UserError(f"all {len(groups)} images belong to one group; it cannot be divided")
    if not 1 <= num_train < len(groups):
        raise UserError(f"{num_train} of {len(groups)} images for TRAIN leave one side empty")
    if sizes.min() > num_train:
        raise UserError(
            f"no group has as few as {num_train} images; choose more for TRAIN, or other groups"
            " with --group"
        )
    rng = np.random.default_rng(seed)

    def score(chosen: np.ndarray) -> tuple[int, int, int]:
        in_train, in_val = (holds[side].any(axis=0).sum() for side in (chosen, ~chosen))
        return int(in_train), int(sizes[chosen].sum()), int(in_val)

    best = max((_draw(sizes, holds, num_train, rng) for _ in range(TRIES)), key=score)
    return best[member]


def _draw(
    sizes: np.ndarray, holds: np.ndarray, num_train: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw groups at random: one for each class still missing, rarest first, then any that fit."""
    chosen = np.zeros(len(sizes), bool)
    order = rng.permutation(len(sizes))
    room = num_train
    for index in np.argsort(holds.sum(axis=0), kind="stable"):
        if not holds[chosen, index].any():
            fitting = [g for g in order if holds[g, index] and sizes[g] <= room]
            if fitting:
                chosen[fitting[0]] = True
                room -= sizes[fitting[0]]
    for group in order:
        if not chosen[group] and sizes[group] <= room:
            chosen[group] = True
            room -= sizes[group]
    return chosen
