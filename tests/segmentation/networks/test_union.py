"""A model file of several networks predicts what their files together do."""

import dataclasses

import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_DIFFUSION
from golden_util import fill_parameters

from guided_diffusion.images.reading import ReadingConfig
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
    """Model files of a U-Net, of smp's and of their union."""
    pytest.importorskip("segmentation_models_pytorch")
    parts = []
    for name, config in (("unet", UNET), ("smp", SMP)):
        weights = fill_parameters(config.build()).state_dict()
        save_model(str(tmp_path / f"{name}.pth"), config, weights)
        parts.append((config, weights))
    save_model(str(tmp_path / "union.pth"), *join(parts))
    return tmp_path


@pytest.fixture
def radiograph():
    return np.random.default_rng(0).random((37, 29, 1), np.float32)


@pytest.mark.parametrize("options", [None, MemberOptions(timesteps=(1, 30))])
def test_it_is_the_mean_of_its_networks(files, radiograph, options):
    both = [str(files / f"{name}.pth") for name in ("unet", "smp")]
    union = load_predictor(str(files / "union.pth"), "cpu", options, tta="shifts")
    (found,) = union.segment([radiograph])
    unet, smp = (
        load_predictor(path, "cpu", some, tta="shifts").segment([radiograph])[0]
        for path, some in zip(both, (options, None))
    )
    weights = (1, 1) if options is None else (2, 1)  # as often as it has timesteps
    assert np.abs(found - np.average([unet, smp], axis=0, weights=weights)).max() < 1e-5
    if options is None:
        (mean,) = load_predictor(",".join(both), "cpu", tta="shifts").segment([radiograph])
        assert np.abs(found - mean).max() < 1e-5
    else:
        with pytest.raises(UserError, match="kind smp have no --timesteps"):
            load_predictor(both[1], "cpu", options)


def test_as_a_module_it_gives_the_logarithm_of_the_mean(files):
    model, config, _ = load_model(str(files / "union.pth"))
    images = th.randn(2, 1, 24, 16)
    mean = sum(network(images).softmax(1) for network in model.networks) / 2
    assert th.allclose(model(images).exp(), mean, atol=1e-6)
    assert config.reading == UNET.reading
    assert config.diffusion == TINY_DIFFUSION
