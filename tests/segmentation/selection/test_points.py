import numpy as np
from scipy.spatial.distance import pdist

from guided_diffusion.segmentation.selection import points as module
from guided_diffusion.segmentation.selection.points import to_points


def vectors(count=40, width=100):
    """Features of three hidden factors with a little noise."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(count, 3)) @ rng.normal(size=(3, width))
    return (factors + 0.01 * rng.normal(size=factors.shape)).astype(np.float32)


def test_distances_are_those_of_the_standardised_features():
    features = vectors()
    found = to_points([features])
    assert found.shape == (40, 3)
    standardised = (features - features.mean(0)) / features.std(0)
    whole, kept = pdist(standardised), pdist(found)
    assert np.corrcoef(whole, kept)[0, 1] > 0.999
    assert (kept < whole * 1.001).all()


def test_units_of_features_do_not_matter():
    features = vectors()
    scaled = features * np.linspace(0.1, 100, 100) + 5
    np.testing.assert_allclose(pdist(to_points([features])), pdist(to_points([scaled])), rtol=1e-3)


def test_parts_are_as_the_whole():
    features = vectors()
    whole = to_points([features])
    parts = to_points([features[:7], features[7:8], features[8:]])
    np.testing.assert_allclose(pdist(parts), pdist(whole), rtol=1e-4)


def test_more_vectors_than_the_sample(monkeypatch):
    features = vectors(count=200)
    whole = to_points([features])
    monkeypatch.setattr(module, "SAMPLE", 60)
    sampled = to_points([features[:150], features[150:]])
    assert len(sampled) == 200
    assert np.corrcoef(pdist(whole), pdist(sampled))[0, 1] > 0.99


def test_constant_features_and_a_single_vector():
    features = vectors()
    features[:, :50] = 3
    assert np.isfinite(to_points([features])).all()
    assert np.isfinite(to_points([features[:1]])).all()
    assert np.ptp(to_points([np.repeat(features[:1], 5, 0)])) == 0
