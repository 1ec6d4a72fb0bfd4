"""No imported image or patient among the radiographs that a network is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

from guided_diffusion.images.duplicates import (
    SAME_PICTURE,
    Fingerprint,
    find_duplicates,
    fingerprint,
)
from guided_diffusion.images.groups import read_groups
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.patients import find_patients
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import warn
from guided_diffusion.runtime.progress import track

_ANYWAY = "leave it out of the import"


@dataclass(frozen=True)
class Film:
    """A radiograph: its name, its file, and what to call it in messages if not by that."""

    name: str
    path: str
    origin: str = ""

    @property
    def shown(self) -> str:
        return self.origin or self.path


class Likeness:
    """Which of some radiographs are the same picture."""

    def __init__(self, films: Sequence[Film]):
        self._prints: dict[str, Fingerprint] = {}
        for film in track(films, "comparing"):
            if film.path not in self._prints:
                self._prints[film.path] = fingerprint(read_image(film.path))
        found = find_duplicates(list(self._prints.values()))
        copies = sum(not identical for *_, identical in found)
        # where most are like another one, they are not copies
        self._tells = 2 * copies <= len(self._prints)

    def identical(self, film: Film, others: Sequence[Film]) -> Film | None:
        """The first with the same pixels."""
        digest = self._prints[film.path].digest
        return next((one for one in others if self._prints[one.path].digest == digest), None)

    def alike(self, one: Film, other: Film) -> bool:
        """Whether two are the same picture, perhaps saved differently."""
        first, second = self._prints[one.path], self._prints[other.path]
        if first.digest == second.digest:
            return True
        return float(first.thumbnail @ second.thumbnail) >= SAME_PICTURE

    def copy(self, film: Film, others: Sequence[Film]) -> Film | None:
        """The first that is the same picture, as far as pictures tell."""
        if not self._tells:
            return self.identical(film, others)
        return next((one for one in others if self.alike(film, one)), None)


def check_apart(
    new: Sequence[Film],
    joined: Sequence[Film],
    others: Sequence[Film],
    likeness: Likeness,
    rule: str = "",
) -> None:
    """Compare imported radiographs with others by name, by content and by patient.

    :param joined: the radiographs that they join, whose names help to tell patients apart.
    :param rule: --group.
    :raises UserError: naming the imported and the other radiograph.
    """
    names = {film.name: film for film in others}
    for film in new:
        if other := names.get(film.name):
            raise UserError(
                f"{film.shown} has the name of {other.path}, which must not be learnt from:"
                f" {_ANYWAY}, or rename it if it is another radiograph"
            )
        if twin := likeness.copy(film, others):
            raise UserError(
                f"{film.shown} is the same picture as {twin.path}, which must not be learnt from:"
                f" {_ANYWAY}"
            )
    if not others:
        return
    everyone = [*new, *others, *joined]
    patients = _patients(everyone, rule)
    of_others = dict(zip(patients[len(new) : len(new) + len(others)], others))
    for film, patient in zip(new, patients):
        if patient in of_others:
            raise UserError(
                f"{film.shown} and {of_others[patient].path} are of one patient, who must not be"
                f" learnt from: {_ANYWAY}, or state who is who with --group"
            )


def _patients(films: Sequence[Film], rule: str) -> Sequence[str | int]:
    """The patient of each."""
    names = [film.name for film in films]
    if rule:
        return read_groups(names, rule)
    patients = find_patients(names, [film.path for film in films])
    if not patients.known:
        warn(
            "nothing tells which images are of one patient, so that only copies are kept"
            " apart; --group states it"
        )
    if len(set(patients.groups)) == 1:
        warn(f"all images seem to be of one patient; {patients.said}; use --group")
        return range(len(films))
    return patients.groups
