"""Intervals and paired tests, against sums by hand and against scipy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from guided_diffusion.segmentation.evaluation.comparison import verdict
from guided_diffusion.segmentation.evaluation.statistics import bootstrap, compare, paired
from guided_diffusion.segmentation.metrics import confusion_matrix


def confusions(count, classes=3, error=0.3, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        true = rng.integers(0, classes, (8, 8))
        wrong = rng.random((8, 8)) < error * rng.random()
        guess = np.where(wrong, rng.integers(0, classes, (8, 8)), true)
        found.append(confusion_matrix(guess, true, classes))
    return found


def test_the_interval_of_a_mean_over_images_is_scipys():
    found = confusions(20)
    dice = [2 * c[1, 1] / (c[1].sum() + c[:, 1].sum()) for c in found]
    ours = bootstrap(found, "abc", 4000)["mean_over_images"]["per_class"]["b"]["dice"]
    theirs = stats.bootstrap((dice,), np.mean, n_resamples=4000, method="percentile", rng=1)
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.004)
    assert ours[0] < np.mean(dice) < ours[1]


def test_the_interval_of_the_set_resamples_whole_images():
    """Two images, one perfect, one all wrong: a draw has a share of 0, 1/2 or 1 of the second."""
    perfect, wrong = np.diag([4, 4]), np.array([[0, 4], [4, 0]])
    found = bootstrap([perfect, wrong], ["none", "some"], 500)
    assert found["per_class"]["some"]["dice"] == [0, 1]
    assert found["mean_dice"] == [0, 1]
    same = bootstrap([perfect, perfect], ["none", "some"], 500)
    assert same["per_class"]["some"]["iou"] == [1, 1]


def test_the_same_seed_gives_the_same_interval():
    found = confusions(6)
    assert bootstrap(found, "abc", 300, 3) == bootstrap(found, "abc", 300, 3)
    assert bootstrap(found, "abc", 300, 3) != bootstrap(found, "abc", 300, 4)


def test_a_class_that_is_nowhere_has_no_interval():
    found = bootstrap([np.pad(c, (0, 1)) for c in confusions(4)], "abcd", 100)
    assert all(math.isnan(v) for v in found["per_class"]["d"]["dice"])
    assert not any(math.isnan(v) for v in found["mean_dice"])


@given(st.integers(0, 10**6), st.integers(2, 10))
@settings(max_examples=20, deadline=None)
def test_the_permutation_test_is_scipys(seed, count):
    rng = np.random.default_rng(seed)
    one = rng.random(count)
    other = one + rng.normal(0.1, 0.2, count)
    theirs = stats.permutation_test(
        (one, other), lambda a, b: np.mean(b - a), permutation_type="samples", vectorized=False
    )
    assert paired(one, other, 100).p_permutation == pytest.approx(theirs.pvalue, abs=1e-9)


def test_many_images_are_permuted_at_random():
    rng = np.random.default_rng(0)
    one = rng.random(40)
    other = one + rng.normal(0.05, 0.2, 40)
    found = paired(one, other)
    assert found.p_permutation == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=0.02)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(one, other).pvalue)
    apart = paired(one, one + 0.1 + rng.normal(0, 0.01, 40))
    assert apart.p_permutation == pytest.approx(1 / 10_001)
    assert apart.p_wilcoxon < 1e-6
    assert apart.difference == pytest.approx(0.1, abs=0.01)
    assert apart.interval[0] < apart.difference < apart.interval[1]
    assert apart.interval[0] > 0.09


def test_equal_models_do_not_differ():
    scores = np.array([0.3, 0.4, 0.5])
    found = paired(scores, scores)
    assert (found.p_permutation, found.p_wilcoxon) == (1, 1)
    assert found.interval == [0, 0]


def test_images_without_the_class():
    nothing = float("nan")
    found = paired(np.array([nothing, nothing, 0.5]), np.array([nothing, 0.0, 0.5]))
    assert (found.images, found.first, found.second) == (2, 0.75, 0.25)
    assert paired(np.array([nothing]), np.array([nothing])) is None


def test_classes_and_their_mean_are_compared():
    better, worse = confusions(12, error=0.1), confusions(12, error=0.9)
    found = compare(worse, better, ["background", "x", "y"])
    assert list(found) == ["mean", "x", "y"]
    mean = found["mean"]
    assert mean.difference == pytest.approx((found["x"].difference + found["y"].difference) / 2)
    assert mean.difference > 0
    assert mean.p_permutation < 0.05
    back = compare(better, worse, ["background", "x", "y"])["mean"]
    assert back.difference == pytest.approx(-mean.difference)
    assert back.p_permutation == mean.p_permutation


@pytest.mark.parametrize(
    ("count", "shift", "says"),
    [
        (2, 0.2, "2 images are too few to tell"),
        (5, 0.2, "5 images are too few to tell"),
        (6, 0.2, "B is better by 0.2"),
        (6, -0.2, "A is better by 0.2"),
        (30, 0.001, "no difference shown on 30 images: not significant"),
    ],
)
def test_nobody_is_better_by_chance(count, shift, says):
    one = np.linspace(0.3, 0.7, count)
    noise = 0.05 * np.cos(np.arange(count) * 2.4)
    said = verdict(paired(one, one + shift + noise - noise.mean()))
    assert says in said
    for part in (f"{count} images", f"B - A = {shift:+.4f}", "95 % interval", "p = "):
        assert part in said
