"""3x3 convolutions by minimal filtering, against torch in float64."""

import pytest
import torch as th
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_util import needs_kernels, relative, same_on_any_threads

from guided_diffusion.kernels import winograd
from guided_diffusion.nn import conv_nd

BOUND = 5e-6
pytestmark = needs_kernels


def compare(images, channels, outputs, height, width):
    generator = th.Generator().manual_seed(0)
    conv = conv_nd(2, channels, outputs, 3, padding=1)
    for parameter in conv.parameters():
        parameter.data = th.randn(parameter.shape, generator=generator)
    x = th.randn(images, channels, height, width, generator=generator)
    x = x.contiguous(memory_format=th.channels_last).requires_grad_()
    inputs = [x, conv.weight, conv.bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, z = winograd.convolve(*inputs), F.conv2d(*exact, padding=1)
    assert y.is_contiguous(memory_format=th.channels_last)
    grad = th.randn(z.shape, generator=generator)
    found = [y, *th.autograd.grad(y, inputs, grad)]
    wanted = [z, *th.autograd.grad(z, exact, grad.double())]
    for name, one, other in zip(("y", "x", "weight", "bias"), found, wanted):
        assert one.shape == other.shape
        terms = images * height * width if name in ("weight", "bias") else 0
        assert relative(one, other, 0.1 * (terms * other.numel()) ** 0.5) < BOUND, name
    return conv, x, y


def test_a_convolution_uses_it():
    conv, x, y = compare(2, 64, 48, 20, 31)
    assert winograd.serves(x, conv.weight)
    assert th.equal(conv(x), y)
    with th.no_grad():
        assert th.equal(conv(x), y)


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 9),
    outputs=st.integers(1, 9),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
)
def test_any_size(images, channels, outputs, height, width):
    compare(images, 16 * channels, 16 * outputs, height, width)


def test_it_is_no_less_exact_than_the_definition():
    generator = th.Generator().manual_seed(0)
    x = th.randn(2, 64, 32, 32, generator=generator).contiguous(memory_format=th.channels_last)
    weight = th.randn(64, 64, 3, 3, generator=generator)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    assert relative(winograd.convolve(x, weight, None), truth) < 2 * relative(
        F.conv2d(x, weight, padding=1), truth
    )


@pytest.mark.parametrize("images", [1, 3])
def test_the_number_of_threads_changes_nothing(images):
    generator = th.Generator().manual_seed(0)
    x = th.randn(images, 32, 30, 30, generator=generator)
    x = x.contiguous(memory_format=th.channels_last).requires_grad_()
    weight = th.randn(48, 32, 3, 3, generator=generator, requires_grad=True)

    def compute():
        y = winograd.convolve(x, weight, None)
        return y.detach(), *th.autograd.grad(y.square().sum(), [x, weight])

    assert same_on_any_threads(compute)


def test_only_what_is_needed_is_computed():
    x = th.randn(2, 16, 16, 16).contiguous(memory_format=th.channels_last).requires_grad_()
    weight = th.randn(16, 16, 3, 3)
    winograd.convolve(x, weight, None).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_what_is_left_to_torch():
    x = th.randn(2, 16, 16, 16).contiguous(memory_format=th.channels_last)
    weight = th.randn(16, 16, 3, 3)
    assert winograd.serves(x, weight)
    assert not winograd.serves(x, weight[:, :, :1])
    assert not winograd.serves(x, weight.double())
    assert not winograd.serves(x[:, :3], weight[:, :3].contiguous())
    assert not winograd.serves(x[:1, :, :4, :4], weight)  # too few positions
    with th.autocast("cpu", th.bfloat16):
        assert not winograd.serves(x, weight)
