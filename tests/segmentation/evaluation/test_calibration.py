"""Calibration: models that are as sure as they are right, and others."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.segmentation.evaluation.calibration import (
    Calibration,
    binary_prediction,
    plot_deciles,
    plot_reliability,
)
from guided_diffusion.segmentation.inference.uncertainty import entropy_map
from guided_diffusion.segmentation.prediction import Prediction


def predict(probabilities):
    probabilities = np.asarray(probabilities, np.float32)
    return Prediction(probabilities, entropy_map(probabilities))


def two_classes(foreground):
    foreground = np.asarray(foreground, np.float32)
    return predict(np.stack([1 - foreground, foreground]))


def drawn(sharpen, seed=0, size=(300, 400)):
    """Truth drawn from p, and a model that says p, or p made more extreme."""
    rng = np.random.default_rng(seed)
    p = rng.random(size)
    true = (rng.random(size) < p).astype(np.uint8)
    logit = sharpen * np.log(p / (1 - p))
    return two_classes(1 / (1 + np.exp(-logit))), true


def test_by_hand():
    calibration = Calibration()
    calibration.add(two_classes([[0.9, 0.9, 0.9, 0.4]]), np.array([[1, 1, 0, 1]]), 0.5)
    # confidence 0.9 thrice, right twice; 0.6 once, wrong
    expected = (abs(2 - 2.7) + 0.6) / 4
    assert calibration.expected_error() == pytest.approx(expected, abs=1e-6)
    assert calibration.bins() == [
        {"share": 0.25, "confidence": pytest.approx(0.6), "accuracy": 0},
        {"share": 0.75, "confidence": pytest.approx(0.9), "accuracy": pytest.approx(2 / 3)},
    ]


def test_a_calibrated_model_has_no_error_and_a_boastful_one_has():
    errors = []
    for sharpen in (1, 3):
        calibration = Calibration()
        calibration.add(*drawn(sharpen), 0.5)
        errors.append(calibration.expected_error())
    assert errors[0] < 0.01
    assert errors[1] > 0.1


def test_deciles_rise_where_uncertainty_means_something():
    calibration = Calibration()
    for seed in range(2):
        calibration.add(*drawn(1, seed), 0.5)
    rates = [decile["error_rate"] for decile in calibration.deciles()]
    assert np.all(np.diff(rates) > 0)
    # p uniform: confidence falls evenly from 1 to 1/2, the error rate rises from 0 to 1/2
    np.testing.assert_allclose(rates, (np.arange(10) + 0.5) / 20, atol=0.01)
    levels = [decile["uncertainty"] for decile in calibration.deciles()]
    assert levels == sorted(levels)


def test_pixels_of_one_uncertainty_are_shared_out():
    calibration = Calibration()
    true = np.zeros((1, 100), np.uint8)
    true[0, :30] = 1
    calibration.add(two_classes(np.full((1, 100), 0.2)), true, 0.5)
    assert [d["error_rate"] for d in calibration.deciles()] == [pytest.approx(0.3)] * 10


def test_ignored_pixels_count_nowhere():
    prediction, true = drawn(1, size=(10, 10))
    hidden = true.copy()
    hidden[:, 5:] = IGNORE
    whole, half = Calibration(), Calibration()
    whole.add(predict(prediction.probabilities[:, :, :5]), true[:, :5], 0.5)
    half.add(prediction, hidden, 0.5)
    assert half.expected_error() == pytest.approx(whole.expected_error())
    assert half.deciles() == whole.deciles()


def test_images_are_ranked():
    calibration = Calibration()
    for p, dice in ((0.9, 0.8), (0.7, 0.6), (0.6, float("nan")), (0.55, 0.3)):
        calibration.add(two_classes([[p]]), np.array([[1]]), dice)
    assert calibration.rank_correlation() == pytest.approx(-1)
    assert "(rank)" in calibration.text()
    few = Calibration()
    few.add(two_classes([[0.9]]), np.array([[1]]), 0.8)
    assert math.isnan(few.rank_correlation())
    assert "rank" not in few.text()


def test_foreground_classes_are_joined():
    joined = binary_prediction(predict([[[0.2, 0.6]], [[0.5, 0.3]], [[0.3, 0.1]]]))
    np.testing.assert_allclose(joined.probabilities, [[[0.2, 0.6]], [[0.8, 0.4]]], atol=1e-6)
    assert joined.uncertainty[0, 1] == pytest.approx(entropy_map(joined.probabilities)[0, 1])


def test_pictures(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    calibration = Calibration()
    calibration.add(*drawn(1, size=(40, 50)), 0.5)
    plot_reliability(calibration, str(tmp_path / "r.png"))
    line = figures[-1].axes[0].lines[1].get_xydata()
    assert line[:, 1].tolist() == [b["accuracy"] for b in calibration.bins()]
    plot_deciles(calibration, str(tmp_path / "d.png"))
    heights = [bar.get_height() for bar in figures[-1].axes[0].patches]
    assert heights == [100 * d["error_rate"] for d in calibration.deciles()]
