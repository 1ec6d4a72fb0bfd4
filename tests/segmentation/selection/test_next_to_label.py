import dataclasses

import numpy as np
import pytest

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.selection.medoids import choose_medoids
from guided_diffusion.segmentation.selection.next_to_label import Seen, choose_next


def radiograph(number, place, uncertainty):
    """One whose vector lies at a place on a line."""
    name = f"r{number:02d}"
    return Seen(name, f"{name}.png", uncertainty, np.array([place, 0], np.float32), name)


def each_its_own(*radiographs):
    return {one.path: number for number, one in enumerate(radiographs)}


def names(choice):
    return [one.name for one in choice.chosen]


# three clouds: the first is certain
CLOUDS = [
    radiograph(n, 100 * (n // 8) + n % 8, 0.1 if n < 8 else 0.5 + n % 8 / 100) for n in range(24)
]


def test_uncertain_ones_that_are_unlike_each_other():
    choice = choose_next(CLOUDS, 2, each_its_own(*CLOUDS))
    assert sorted(n // 8 for n in (int(name[1:]) for name in names(choice))) == [1, 2]
    assert choice.considered == 24
    assert min(one.uncertainty for one in choice.candidates) >= 0.5
    order = [one.uncertainty for one in choice.candidates]
    assert order == sorted(order, reverse=True)


def test_unlike_those_labelled_already():
    labelled = [radiograph(50, 103, 0.5), radiograph(51, 104, 0.5)]
    patients = each_its_own(*CLOUDS, *labelled)
    (name,) = names(choose_next(CLOUDS, 1, patients, labelled))
    assert int(name[1:]) // 8 == 2
    other = [radiograph(50, 203, 0.5)]
    (name,) = names(choose_next(CLOUDS, 1, patients, other))
    assert int(name[1:]) // 8 == 1


def test_a_patient_and_a_picture_once():
    patients = each_its_own(*CLOUDS)
    patients |= {one.path: 99 for one in CLOUDS[8:16]}
    chosen = names(choose_next(CLOUDS, 6, patients))
    assert sum(8 <= int(name[1:]) < 16 for name in chosen) <= 1
    # the labelled patient's others do not come again, nor do copies of a labelled radiograph
    labelled = [dataclasses.replace(CLOUDS[8], name="other", path="other.png", digest="r23")]
    patients["other.png"] = 99
    chosen = names(choose_next(CLOUDS, 15, patients, labelled))
    assert not {f"r{n:02d}" for n in (*range(8, 16), 23)} & set(chosen)
    with pytest.raises(UserError, match="--label_next 16: the radiographs are of 15 patients"):
        choose_next(CLOUDS, 16, patients, labelled)


def test_certain_ones_join_where_uncertain_ones_are_of_too_few_patients():
    patients = each_its_own(*CLOUDS)
    patients |= {one.path: 99 for one in CLOUDS[8:]}
    chosen = names(choose_next(CLOUDS, 3, patients))
    assert sum(int(name[1:]) < 8 for name in chosen) == 2


def test_equal_predictions_and_infinite_uncertainty():
    same = [radiograph(n, 0, float("inf")) for n in range(4)]
    choice = choose_next(same, 4, each_its_own(*same))
    assert sorted(names(choice)) == [one.name for one in same]
    assert choice.medoids.nearest[choice.medoids.chosen].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_given_medoids_stay_and_no_exchange_is_better(seed):
    points = np.random.default_rng(seed).normal(size=(40, 3)).astype(np.float32)
    given = [38, 39]
    found = choose_medoids(points, 3, range(40), given)
    assert not set(given) & set(found.chosen)

    def total(chosen):
        distances = np.linalg.norm(points[:, None] - points[[*chosen, *given]], axis=2)
        return distances.min(1).sum()

    best = total(found.chosen)
    assert found.reached[-1] == pytest.approx(best / 40, rel=1e-4)
    for place in range(3):
        for other in set(range(38)) - set(found.chosen):
            changed = [*found.chosen[:place], other, *found.chosen[place + 1 :]]
            assert total(changed) > best * (1 - 1e-5)
    medoids = np.array([*found.chosen, *given])
    nearest = np.linalg.norm(points[:, None] - points[medoids], axis=2).argmin(1)
    assert np.array_equal(found.nearest, np.where(nearest < 3, nearest, -1))
