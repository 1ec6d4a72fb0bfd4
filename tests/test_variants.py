"""Other ways to compute the same network agree with float32 to stated bounds."""

import dataclasses
import shutil

import pytest
import torch as th
from conftest import TINY
from golden_util import fill_parameters, relative, tensor

IMAGES = tensor("images", 2, TINY.in_channels, TINY.image_size, TINY.image_size)
TIMESTEPS = th.tensor([1.0, 500.0])


@pytest.fixture
def network():
    return fill_parameters(TINY.build())


def output_and_gradients(model, images=IMAGES, dtype=th.float32):
    with th.autocast("cpu", dtype, enabled=dtype != th.float32):
        output = model(images, TIMESTEPS).float()
    gradients = th.autograd.grad(output.square().mean(), [*model.parameters()])
    return output.detach(), th.cat([gradient.flatten() for gradient in gradients])


def test_channels_last(network):
    expected = output_and_gradients(network)
    found = output_and_gradients(
        network.to(memory_format=th.channels_last),
        IMAGES.contiguous(memory_format=th.channels_last),
    )
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(found[1], expected[1]) < 1e-5


def test_bfloat16(network):
    expected = output_and_gradients(network)
    found = output_and_gradients(network, dtype=th.bfloat16)
    assert 1e-4 < relative(found[0], expected[0]) < 0.03
    assert relative(found[1], expected[1]) < 0.06


@pytest.mark.skipif(not shutil.which("g++"), reason="torch's compiler needs g++")
def test_compiled_by_inductor():
    """The innermost blocks, residual ones and attention: compiling the whole takes its time."""
    small = dataclasses.replace(TINY, image_size=8, channel_mult="1")
    blocks = fill_parameters(small.build()).eval().middle_block
    x = tensor("features", 2, small.num_channels, 8, 8)
    embedding = tensor("embedding", 2, 4 * small.num_channels)
    with th.no_grad():
        expected = blocks(x, embedding)
        found = th.compile(blocks)(x, embedding)
    assert relative(found, expected) < 1e-5
