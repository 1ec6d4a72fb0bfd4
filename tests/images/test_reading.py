import json

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.images.geometry import Geometry
from guided_diffusion.images.image_io import Intensity
from guided_diffusion.images.reading import (
    ReadingConfig,
    low_contrast_advice,
    normalize,
    to_uint8_channels,
)
from guided_diffusion.runtime.errors import UserError

DEEP = (np.arange(40 * 60) * 20).astype(np.uint16).reshape(40, 60)


@pytest.fixture
def deep(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    return str(tmp_path / "deep.png")


def test_json_round_trip():
    config = ReadingConfig((32, 48), 1, "pad", "window", window_center=40, window_width=400)
    plain = json.loads(json.dumps(config.to_dict()))
    assert ReadingConfig.from_dict(plain) == config
    assert ReadingConfig.from_dict({}) == ReadingConfig()


def test_parts_of_a_configuration():
    config = ReadingConfig(48, 1, "squash", "percentile", percentile_low=1, percentile_high=98)
    assert config.geometry() == Geometry("squash", 48)
    assert config.intensity_rule() == Intensity("percentile", 1, 98)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_load_gives_eight_bits_at_the_networks_size(deep, channels, resize):
    image = ReadingConfig((16, 24), channels, resize).load(deep)
    assert image.shape == (16, 24, channels)
    assert image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    # 40 x 60 fits 16 x 24 without loss, and 255 / 65535 of each value is left
    assert abs(float(image.mean()) - DEEP.mean() / 257) < 1


def test_eight_bits_come_after_the_intensity_rule(tmp_path):
    faint = (1000 + np.arange(256)).astype(np.uint16).repeat(4).reshape(32, 32)
    Image.fromarray(faint).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    assert len(np.unique(ReadingConfig(32, 1).load(path))) <= 3
    config = ReadingConfig(32, 1, "native", "percentile", 0, 100)
    assert len(np.unique(config.load(path))) == 256


def test_native_keeps_the_size(deep):
    assert ReadingConfig(16, 1, "native").load(deep).shape == (40, 60, 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_size": 0}, "image_size 0"),
        ({"image_size": (4, 5, 6)}, "image_size"),
        ({"image_size": 3.5}, "image_size 3.5"),
        ({"in_channels": 2}, "in_channels 2"),
        ({"resize": "stretch"}, "resize 'stretch' must be one of crop, pad, squash, native"),
        ({"intensity": "auto"}, "intensity 'auto'"),
        ({"percentile_low": 99.9}, "percentiles"),
        ({"window_center": 3.0}, "window"),
    ],
)
def test_impossible_values_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        ReadingConfig(**values)


def test_unknown_entries_are_refused_by_name():
    with pytest.raises(UserError, match="sharpen"):
        ReadingConfig.from_dict({"image_size": 8, "sharpen": 1})


def test_normalize():
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    images[0, 0, 0] = (0, 255, 51)
    result = normalize(images)
    assert result.shape == (2, 3, 4, 5)
    assert result.dtype == th.float32
    assert result.is_contiguous()
    np.testing.assert_allclose(result[0, :, 0, 0], [-1, 1, -0.6], atol=1e-6)
    np.testing.assert_allclose(result[1, 2, 3, 1], images[1, 3, 1, 2] / 127.5 - 1, atol=1e-6)
    assert images[0, 0, 0, 1] == 255


def test_to_uint8_channels_rounds():
    image = np.array([[0.0, 0.5, 1.0, 0.1]], dtype=np.float32)
    assert to_uint8_channels(image, 3)[0, :, 1].tolist() == [0, 128, 255, 26]
    assert to_uint8_channels(image, 1).shape == (1, 4, 1)


def test_advice_where_few_grey_levels_are_used(tmp_path, deep):
    faint = (DEEP // 64).astype(np.uint16)
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(faint).save(paths[-1])
    (tmp_path / "bad.png").write_text("unreadable files are ignored")
    advice = low_contrast_advice([*paths, str(tmp_path / "bad.png")], ReadingConfig())
    assert "1.1 %" in advice
    assert "3 of 255" in advice
    assert "--intensity percentile" in advice
    assert low_contrast_advice(paths, ReadingConfig(intensity="percentile")) is None
    assert low_contrast_advice([deep], ReadingConfig()) is None
    Image.fromarray((DEEP // 4000).astype(np.uint8)).save(tmp_path / "eight_bits.png")
    assert low_contrast_advice([str(tmp_path / "eight_bits.png")], ReadingConfig()) is None
