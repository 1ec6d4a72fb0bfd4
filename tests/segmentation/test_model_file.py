"""The model file: what a segmentation network is, and how its kind is built."""

import dataclasses

import numpy as np
import pytest
import torch as th
from conftest import TINY
from golden_util import fill_parameters

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation import model_file
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference.predictor import Predictor
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model, save_model
from guided_diffusion.segmentation.networks.kind import MemberOptions

CONFIG = SegmentationConfig(TINY, ReadingConfig(16, 1, "pad"), generic_categories(3))


def build(config):
    return th.nn.Conv2d(config.in_channels, len(config.categories), config.options["kernel"])


def saved(tmp_path, config, **changed):
    path = str(tmp_path / "segm.pth")
    save_model(path, config, config.build().state_dict())
    values = checkpoint.load(path)
    for name, value in changed.items():
        if value is None:
            del values[name]
        else:
            values[name] = value
    checkpoint.save(path, values)
    return path


def test_a_file_without_kind_is_a_unet(tmp_path):
    model, config, _ = load_model(saved(tmp_path, CONFIG, kind=None, options=None))
    assert config == CONFIG
    assert model(th.zeros(1, 1, 10, 9)).shape == (1, 3, 10, 9)


def test_other_kinds_are_built_from_their_options(tmp_path, monkeypatch):
    monkeypatch.setitem(model_file.KINDS, "line", __name__)
    config = SegmentationConfig(
        None, CONFIG.reading, CONFIG.categories, kind="line", options={"kernel": 5}
    )
    model, read, _ = load_model(saved(tmp_path, config))
    assert read == config
    assert model.weight.shape == (3, 1, 5, 5)


def test_an_unknown_kind_is_named(tmp_path):
    with pytest.raises(UserError, match=r"segm.pth.*'quantum'.*unet"):
        load_model(saved(tmp_path, CONFIG, kind="quantum"))


@pytest.mark.parametrize("swaps", [None, (), ((1, 2),), ((0, 1), (2, 0))])
def test_the_classes_exchanged_in_training_are_kept(tmp_path, swaps):
    config = dataclasses.replace(CONFIG, flip_swaps=swaps)
    _, read, _ = load_model(saved(tmp_path, config))
    assert read == config


@pytest.mark.parametrize(
    ("flags", "swaps"),
    [
        ({}, None),
        ({"flip": "none", "flip_swap": ""}, None),
        ({"flip": "vertical"}, None),
        ({"flip": "horizontal"}, ()),
        ({"flip": "both", "flip_swap": "1:2"}, ((1, 2),)),
        ({"flip_swap": "1:2"}, ((1, 2),)),
    ],
)
def test_older_files_tell_the_exchanged_classes_by_their_flags(tmp_path, flags, swaps):
    _, read, _ = load_model(saved(tmp_path, CONFIG, flip_swaps=None, origin=flags))
    assert read.flip_swaps == swaps


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", None, "needs the architecture"),
        ("model", 7, "settings by name"),
        ("reading", {"image_size": "big"}, "image_size is 'big', but must be a whole number or"),
        ("reading", [], "settings by name"),
        ("depth", "deep", "depth is 'deep', but must be a whole number or"),
        ("timestep", None, "timestep is None, but must be a number"),
        ("options", 3, "options is 3"),
        ("kind", [], "kind"),
        ("categories", "few", "expected a list"),
        ("state_dict", {}, "weights of another network"),
        ("state_dict", 7, "describes no network|weights of another"),
    ],
)
def test_values_that_this_package_did_not_write(tmp_path, key, value, said):
    path = saved(tmp_path, CONFIG)
    values = checkpoint.load(path)
    for change in ({**values, key: value}, {k: v for k, v in values.items() if k != key}):
        th.save(change, path)
        wanted = said if key in change else f"lacks '{key}'"
        if key in change or key not in ("kind", "options"):
            with pytest.raises(UserError, match=rf"segm\.pth.*({wanted})"):
                load_model(path)


class TestTimesteps:
    """Users count diffusion steps, whatever the network's own units."""

    steps = 4000

    def config(self, rescale):
        diffusion = DiffusionConfig(diffusion_steps=self.steps, rescale_timesteps=rescale)
        return dataclasses.replace(CONFIG, diffusion=diffusion)

    @pytest.mark.parametrize(("rescale", "scale"), [(True, 0.25), (False, 1)])
    def test_prediction_converts_as_fine_tuning_does(self, tmp_path, rescale, scale):
        config = self.config(rescale)
        model, read, _ = load_model(saved(tmp_path, config))
        assert read == config
        assert config.network_timesteps((0, 8, 600)) == (0, 8 * scale, 600 * scale)
        fill_parameters(model)
        image = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
        wanted = dataclasses.replace(read, timestep=network_timestep(600, read.diffusion))
        twin = wanted.build()
        twin.load_state_dict(model.state_dict())
        (one,) = Predictor(model, read, options=MemberOptions(timesteps=(600,))).start([image])
        (other,) = Predictor(twin, wanted).start([image])
        np.testing.assert_allclose(one().probabilities, other().probabilities, atol=1e-6)

    def test_a_step_that_there_is_not(self, tmp_path):
        model, read, _ = load_model(saved(tmp_path, self.config(True)))
        with pytest.raises(UserError, match=r"--timesteps 1,4000: .* steps 0 to 3999"):
            Predictor(model, read, options=MemberOptions(timesteps=(1, 4000)))

    def test_older_files_mean_what_they_meant(self, tmp_path):
        _, read, _ = load_model(saved(tmp_path, self.config(True), diffusion=None))
        assert read.diffusion is None
        assert read.network_timesteps((1, 5000)) == (1, 5000)
