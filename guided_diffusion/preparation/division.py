"""Which radiographs train and which validate: no patient on both sides, every class in TRAIN."""

import csv
import os
import re
from collections.abc import Sequence

import numpy as np

from guided_diffusion.images.files import IMAGE_EXTENSIONS, open_file
from guided_diffusion.runtime.errors import UserError

TRIES = 64


def read_groups(names: Sequence[str], rule: str) -> list[str]:
    """The group (the patient) of each name.

    :param rule: "" for a group of its own each; a CSV file of lines NAME,GROUP; or a regular
        expression, whose first group, or else whole match, is the patient.
    """
    if not rule:
        return list(names)
    if rule.lower().endswith(".csv"):
        return _from_csv(names, rule)
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise UserError(f"--group {rule}: not a regular expression ({error})") from error
    matches = [pattern.search(name) for name in names]
    missing = [name for name, match in zip(names, matches) if not match]
    if missing:
        raise UserError(
            f"--group {rule} matches nothing in {len(missing)} of {len(names)} names: "
            + ", ".join(missing[:5])
        )
    return [(match.group(1) or "") if pattern.groups else match.group() for match in matches]


def _from_csv(names: Sequence[str], path: str) -> list[str]:
    if not os.path.isfile(path):
        raise UserError(f"--group {path} does not exist")
    groups = {}
    with open_file(path) as file:
        lines = file.read().decode("utf-8-sig").splitlines()
    for row in csv.reader(lines):
        if len(row) >= 2:
            stem, ending = os.path.splitext(row[0].strip())
            groups[row[0].strip()] = row[1].strip()
            if ending.lower() in IMAGE_EXTENSIONS:
                groups.setdefault(stem, row[1].strip())
    found = [groups.get(name, groups.get(name.split("/")[-1])) for name in names]
    missing = [name for name, group in zip(names, found) if not group]
    if missing:
        raise UserError(
            f"--group {path} has no group for {len(missing)} of {len(names)} names: "
            + ", ".join(missing[:5])
        )
    return found


def divide(groups: Sequence[str], classes: np.ndarray, num_train: int, seed: int) -> np.ndarray:
    """Choose TRAIN, bool [N]: whole groups, `num_train` images or as many fewer as groups force.

    Of many random choices the one is taken in which most classes are in TRAIN, then most in VAL.

    :param groups: N names.
    :param classes: whether image n holds class c, bool [N x C].
    :raises UserError: where one side would be empty.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(member)
    holds = np.zeros((len(names), classes.shape[1]), bool)
    np.logical_or.at(holds, member, classes)
    if len(names) < 2:
        raise UserError(f"all {len(groups)} images belong to one group; they cannot be divided")
    if not 1 <= num_train < len(groups):
        raise UserError(f"{num_train} of {len(groups)} images for TRAIN leave one side empty")
    if sizes.min() > num_train:
        raise UserError(f"no group has as few as {num_train} images; choose more for TRAIN")
    rng = np.random.default_rng(seed)
    best, best_score = None, None
    for _ in range(TRIES):
        chosen = _draw(sizes, holds, num_train, rng)
        count = sizes[chosen].sum()
        # classes in TRAIN count before the wanted number, that before classes in VAL
        score = (holds[chosen].any(axis=0).sum(), count, holds[~chosen].any(axis=0).sum())
        if best_score is None or score > best_score:
            best, best_score = chosen, score
    return best[member]


def _draw(
    sizes: np.ndarray, holds: np.ndarray, num_train: int, rng: np.random.Generator
) -> np.ndarray:
    """Random groups: for the rarest class that is missing first, then any that fits."""
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
