"""Which radiographs to correct next: uncertain ones, unlike each other and those labelled already.

First the least certain are taken, more than are wanted, and among these the medoids: the batch
covers what the model is unsure of, rather than the same difficulty many times (arXiv 1901.05954).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.selection.medoids import Medoids, choose_medoids
from guided_diffusion.segmentation.selection.points import to_points

# candidates for each radiograph to choose, and the largest share of all radiographs that they are
_CANDIDATES = 10
_SHARE = 0.5


@dataclass(frozen=True)
class Seen:
    """A radiograph as a model has seen it.

    uncertainty: see `inference.uncertainty.uncertainty_of`. vector: what is predicted where,
    float32 [D]. digest: of the pixels.
    """

    name: str
    path: str
    uncertainty: float
    vector: np.ndarray
    digest: str


@dataclass(frozen=True)
class Next:
    """A choice.

    candidates: the least certain radiographs, in that order. labelled: those that count as chosen.
    medoids: of the candidates and, after them, of the labelled ones. considered: how many
    radiographs the candidates are the least certain of.
    """

    candidates: list[Seen]
    labelled: list[Seen]
    medoids: Medoids
    considered: int

    @property
    def chosen(self) -> list[Seen]:
        """The best first."""
        return [self.candidates[number] for number in self.medoids.chosen]


def choose_next(
    seen: Sequence[Seen],
    count: int,
    patients: Mapping[str, int],
    labelled: Sequence[Seen] = (),
    avoided: Mapping[str, str] | None = None,
) -> Next:
    """Choose `count` radiographs of as many patients.

    :param seen: to choose from; those with the pixels of a labelled, an avoided or an earlier one
        do not count.
    :param patients: of all radiographs, by their paths; those of labelled or avoided ones do not
        count.
    :param avoided: digests of the pixels of further radiographs, by their paths.
    :raises UserError: if there are not so many patients.
    """
    known = {**{one.path: one.digest for one in labelled}, **(avoided or {})}
    free = _free(seen, count, patients, known)
    candidates = _least_certain(free, count, patients)
    everyone = [*candidates, *labelled]
    groups = [patients[one.path] for one in everyone]
    points = to_points([np.stack([one.vector for one in everyone])])
    given = range(len(candidates), len(everyone))
    medoids = choose_medoids(points, count, groups, given)
    return Next(candidates, list(labelled), medoids, len(free))


def least_certain(
    seen: Sequence[Seen], count: int, patients: Mapping[str, int], labelled: Sequence[Seen] = ()
) -> list[Seen]:
    """The `count` least certain ones of as many patients, however alike; see `choose_next`."""
    first: dict[int, Seen] = {}
    for one in _free(seen, count, patients, {one.path: one.digest for one in labelled}):
        first.setdefault(patients[one.path], one)
    return [*first.values()][:count]


def _free(
    seen: Sequence[Seen], count: int, patients: Mapping[str, int], known: Mapping[str, str]
) -> list[Seen]:
    """Those that may be chosen, the least certain first.

    :param known: digests of the radiographs that count as chosen or not at all, by path.
    """
    digests = set(known.values())
    groups = {patients[path] for path in known}
    free: list[Seen] = []
    for one in seen:
        if one.digest not in digests and patients[one.path] not in groups:
            digests.add(one.digest)
            free.append(one)
    check_count(count, len({patients[one.path] for one in free}), bool(known))
    return sorted(free, key=lambda one: -one.uncertainty)


def check_count(count: int, patients: int, some_known: bool = False) -> None:
    """:raises UserError: if one patient would have to be chosen twice.

    :param some_known: whether patients of labelled radiographs are not counted.
    """
    if count > patients:
        which = "are of {} patients" + " without a labelled one" * some_known
        raise UserError(
            f"--label_next {count}: the radiographs {which.format(patients)}, and no more than one"
            " of each is chosen: lower --label_next, or add radiographs"
        )


def _least_certain(free: Sequence[Seen], count: int, patients: Mapping[str, int]) -> list[Seen]:
    """The first of `free`, and more where these are of fewer than `count` patients."""
    size = max(count, min(_CANDIDATES * count, math.ceil(_SHARE * len(free))))
    while len({patients[one.path] for one in free[:size]}) < count:
        size += 1
    return list(free[:size])
