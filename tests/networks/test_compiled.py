"""Compiled networks give what the plain ones do; the backend here compiles nothing, in no time."""

import functools

import numpy as np
import pytest
import torch as th
from conftest import TINY
from golden_util import fill_parameters
from mask_diffusion_util import build, config_of
from sampling_util import DIFFUSION, QUICK, same, write_trained

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.kernels import library as kernels
from guided_diffusion.networks.compiled import compiled
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference.predictor import Predictor
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.networks.kind import MemberOptions
from guided_diffusion.segmentation.networks.mask_diffusion import describe


@pytest.fixture
def calls(monkeypatch):
    """Counts graphs, which a backend of its own takes as they are."""
    counted = []

    def backend(graph, _inputs):
        counted.append(graph)
        return graph.forward

    monkeypatch.setattr(th, "compile", functools.partial(th.compile, backend=backend))
    monkeypatch.setattr("guided_diffusion.networks.compiled._mode", lambda: None)
    # torch traces its own operations, so these are what to compare with
    monkeypatch.setattr("guided_diffusion.kernels.library.library", lambda: None)
    th.compiler.reset()
    return counted


def test_results_are_the_callers_own(calls):
    place = th.zeros(3)

    def network(x):
        return place.copy_(x)  # as a CUDA graph writes to the same memory every time

    call = compiled(network)
    first, second = call(th.ones(3)), call(th.full((3,), 2.0))
    assert calls
    assert first.tolist() == [1, 1, 1]
    assert second.tolist() == [2, 2, 2]


@pytest.mark.parametrize("resize", ["pad", "native"])
def test_prediction(calls, resize):
    config = SegmentationConfig(TINY, ReadingConfig(16, 1, resize), generic_categories(3))
    network = fill_parameters(config.build())
    image = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    plain = Predictor(network, config).segment([image])[0]
    assert not calls
    found = Predictor(network, config, options=MemberOptions(compile=True)).segment([image])[0]
    assert calls
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_a_network_that_draws_masks(calls):
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    config = describe(config_of(3), DIFFUSION, ReadingConfig(16, 1, "pad"), generic_categories(3))
    plain = Predictor(build(), config).segment([image])[0]
    assert not calls
    found = Predictor(build(), config, options=MemberOptions(compile=True)).segment([image])[0]
    assert calls
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_sampling(script, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)  # torch traces its own operations
    model = write_trained(tmp_path / "run")
    for name, more in (("plain", ()), ("compiled", ("--compile", "True"))):
        done = script("image_sample.py", "--model_path", model, *QUICK, *more, "--out_dir", name)
        assert done.code == 0, done.err
        assert bool(calls) == bool(more)
    assert same(tmp_path / "plain", tmp_path / "compiled", tolerance=0)
