import itertools

import numpy as np
import pytest

from guided_diffusion.segmentation.selection import medoids
from guided_diffusion.segmentation.selection.medoids import choose_medoids


def scattered(count, seed=0, width=6):
    """Points in a few clouds, float32 [count x width]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, width)) * 3
    points = centres[rng.integers(5, size=count)] + rng.normal(size=(count, width))
    return points.astype(np.float32)


def total(points, chosen):
    """Sum of the distances to the nearest of the chosen points."""
    return np.linalg.norm(points[:, None] - points[list(chosen)], axis=2).min(1).sum()


def test_one_of_each_cloud_and_the_largest_first():
    rng = np.random.default_rng(0)
    sizes, centres = (30, 20, 10), ((0, 0), (0, 50), (50, 0))
    clouds = [rng.normal(centre, 1, (size, 2)) for size, centre in zip(sizes, centres)]
    points = np.concatenate(clouds).astype(np.float32)
    found = choose_medoids(points, 3, range(60))
    cloud = np.repeat([0, 1, 2], sizes)
    assert cloud[found.chosen].tolist() == [0, 1, 2]
    assert (found.nearest == cloud).all()
    assert found.distance[found.chosen].tolist() == [0, 0, 0]
    distances = np.linalg.norm(points - points[found.chosen][found.nearest], axis=1)
    np.testing.assert_allclose(found.distance, distances, atol=1e-3)
    assert found.reached == sorted(found.reached, reverse=True)
    assert found.reached[-1] == pytest.approx(distances.mean(), rel=1e-4)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_exchange_would_be_better(seed, grouped):
    points = scattered(60, seed)
    groups = np.arange(60) // (3 if grouped else 1)
    chosen = choose_medoids(points, 5, groups).chosen
    assert len(set(groups[chosen])) == 5
    reached = total(points, chosen)
    for place, other in itertools.product(range(5), range(60)):
        changed = [*chosen[:place], other, *chosen[place + 1 :]]
        if len(set(groups[changed])) == 5:
            assert total(points, changed) > reached * (1 - 1e-5)


def test_build_is_the_greedy_choice():
    points = scattered(80)
    search = medoids._Search(points, np.arange(80))
    search.build(6)
    greedy = []
    for _ in range(6):
        rest = [n for n in range(80) if n not in greedy]
        greedy.append(min(rest, key=lambda n: total(points, [*greedy, n])))
    assert search.chosen == greedy


def test_a_part_of_the_selection_is_nearly_as_good_as_one_of_its_size():
    points = scattered(300, width=12)
    many = choose_medoids(points, 20, range(300)).chosen
    for k in (1, 2, 5, 10):
        own = choose_medoids(points, k, range(300)).chosen
        assert total(points, many[:k]) < 1.03 * total(points, own)


def test_blocks_do_not_change_the_choice(monkeypatch):
    points = scattered(100)
    whole = choose_medoids(points, 7, range(100))
    monkeypatch.setattr(medoids, "_BLOCK", 700)
    parts = choose_medoids(points, 7, range(100))
    assert total(points, parts.chosen) == pytest.approx(total(points, whole.chosen), rel=0.02)
    assert parts.chosen[0] == whole.chosen[0]


def test_equal_points_and_all_points():
    points = np.zeros((4, 3), np.float32)
    assert sorted(choose_medoids(points, 4, range(4)).chosen) == [0, 1, 2, 3]
    assert choose_medoids(points[:1], 1, [0]).chosen == [0]
