"""Choosing which radiographs to label: those that stand for all others."""

from collections.abc import Mapping

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.selection.medoids import Medoids, choose_medoids
from guided_diffusion.segmentation.selection.points import to_points
from guided_diffusion.segmentation.selection.pool import Pool


def choose(pool: Pool, k: int, patients: Mapping[str, int]) -> Medoids:
    """Choose k radiographs of k patients, as indices into `pool.paths`.

    :param patients: of the radiographs, by their paths.
    :raises UserError: for fewer patients.
    """
    groups = [patients[path] for path in pool.paths]
    check_patients(k, len(set(groups)))
    return choose_medoids(to_points(pool.vectors), k, groups)


def check_patients(k: int, count: int) -> None:
    """:raises UserError: if one patient would have to be chosen twice."""
    if k > count:
        raise UserError(
            f"--k {k}: the radiographs are of {count} patients, and no more than one of each is"
            " chosen: lower --k, or add radiographs"
        )
