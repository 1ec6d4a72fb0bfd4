"""A model file of several networks predicts what their files together do."""

import dataclasses

import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_DIFFUSION
from golden_util import fill_parameters

from guided_diffusion.images.reading import ReadingConfig, normalize
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference.predictor import load_predictor
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model, save_model
from guided_diffusion.segmentation.networks.kind import MemberOptions
from guided_diffusion.segmentation.networks.union import join

UNET = SegmentationConfig(
    TINY, ReadingConfig(16, 1, "pad"), generic_categories(3), diffusion=TINY_DIFFUSION
)
SMP = dataclasses.replace(
    UNET, model=None, kind="smp", options={"encoder": "resnet18"}, diffusion=None
)


@pytest.fixture
def files(tmp_path):
    """Model files of a U-Net, of smp's and of their union, of which older ones lack a key."""
    pytest.importorskip("segmentation_models_pytorch")
    parts = []
    for name, config in (("unet", UNET), ("smp", SMP)):
        th.manual_seed(0)
        network = config.build()
        weights = (fill_parameters(network) if name == "unet" else network).state_dict()
        save_model(str(tmp_path / f"{name}.pth"), config, weights)
        parts.append((config, weights))
    config, weights = join(parts)
    save_model(str(tmp_path / "union.pth"), config, weights)
    networks = {"networks": config.options["networks"]}
    save_model(str(tmp_path / "old.pth"), dataclasses.replace(config, options=networks), weights)
    return tmp_path


@pytest.fixture
def radiograph():
    return np.random.default_rng(0).random((37, 29, 1), np.float32)


@pytest.mark.parametrize("options", [None, MemberOptions(timesteps=(1, 30))])
def test_an_older_one_is_the_mean_of_its_networks(files, radiograph, options):
    both = [str(files / f"{name}.pth") for name in ("unet", "smp")]
    union = load_predictor(str(files / "old.pth"), "cpu", options, tta="shifts")
    (found,) = union.segment([radiograph])
    unet, smp = (
        load_predictor(path, "cpu", some, tta="shifts").segment([radiograph])[0]
        for path, some in zip(both, (options, None))
    )
    assert np.abs(found - (unet + smp) / 2).max() < 1e-5
    if options is None:
        (mean,) = load_predictor(",".join(both), "cpu", tta="shifts").segment([radiograph])
        assert np.abs(found - mean).max() < 1e-5
    else:
        with pytest.raises(UserError, match="kind smp have no --timesteps"):
            load_predictor(both[1], "cpu", options)


def mean_of(model, images):
    """Of two networks' probabilities, weighted by the inverse square of their entropy."""
    found = [network(images).softmax(1) for network in model.networks]
    doubts = [-(p * p.log()).sum(1).mean((1, 2)) / np.log(3) + 1e-4 for p in found]
    shares = th.stack(doubts) ** -2
    shares = (shares / shares.sum(0))[..., None, None, None]
    assert not th.allclose(shares[:, :1], shares[:, 1:], rtol=1e-3)  # images differ
    return (shares * th.stack(found)).sum(0)


def test_only_networks_that_read_alike_are_joined():
    other = dataclasses.replace(UNET, reading=ReadingConfig(32, 1, "pad"))
    with pytest.raises(UserError, match="image_size 16 and 32"):
        join([(UNET, {}), (other, {})])


@th.no_grad()
def test_the_more_certain_network_counts_more(files):
    union = load_predictor(str(files / "union.pth"), "cpu")
    model = load_model(str(files / "union.pth"))[0]
    images = np.random.default_rng(1).random((2, 16, 16, 1), np.float32)
    images[1] = images[1] > 0.9
    found = union.segment(list(images))
    seen = th.stack([normalize(UNET.reading.prepare(image)[None])[0] for image in images])
    assert np.abs(np.stack(found) - mean_of(model, seen).numpy()).max() < 1e-5


@th.no_grad()
def test_as_a_module_it_gives_the_logarithm_of_the_mean(files):
    model, config, _ = load_model(str(files / "union.pth"))
    images = th.stack([th.randn(1, 24, 16), th.ones(1, 24, 16)])
    assert th.allclose(model(images).exp(), mean_of(model, images), atol=1e-6)
    old, *_ = load_model(str(files / "old.pth"))
    mean = sum(network(images).softmax(1) for network in old.networks) / 2
    assert th.allclose(old(images).exp(), mean, atol=1e-6)
    assert config.reading == UNET.reading
    assert config.diffusion == TINY_DIFFUSION
