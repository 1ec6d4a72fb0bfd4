"""Convolutions in bfloat16, against torch in float64 on the same rounded numbers."""

import pytest
import torch as th
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_util import needs_kernels, relative

from guided_diffusion.kernels import convolution
from guided_diffusion.kernels.library import has_amx
from guided_diffusion.nn import conv_nd

BOUND = 6e-3
pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not has_amx(), reason="bfloat16 is slow without units for it"),
]


@pytest.fixture(autouse=True)
def bfloat16():
    with th.autocast("cpu", th.bfloat16):
        yield


def compare(images, channels, outputs, height, width, **settings):
    generator = th.Generator().manual_seed(0)
    conv = conv_nd(2, channels, outputs, **settings)
    for parameter in conv.parameters():
        parameter.data = th.randn(parameter.shape, generator=generator).bfloat16().float()
    x = th.randn(images, channels, height, width, generator=generator).bfloat16().requires_grad_()
    inputs = [x, conv.weight, conv.bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    arguments = (conv.stride, conv.padding, conv.dilation)
    assert convolution.serves(x, conv.weight, conv.groups)
    y = conv(x)
    z = F.conv2d(*exact, *arguments)
    assert y.dtype == th.bfloat16
    grad = th.randn(z.shape, generator=generator).bfloat16()
    found = [y, *th.autograd.grad(y, inputs, grad)]
    wanted = [z, *th.autograd.grad(z, exact, grad.double())]
    for name, one, other in zip(("y", "x", "weight", "bias"), found, wanted):
        assert one.shape == other.shape
        terms = images * z.shape[2] * z.shape[3] if name in ("weight", "bias") else 0
        assert relative(one, other, 0.1 * (terms * other.numel()) ** 0.5) < BOUND, name
    assert found[2].dtype == th.float32
    assert found[2].is_contiguous()


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 1},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": (3, 1), "padding": (1, 0)},
    ],
)
@pytest.mark.parametrize("side", [12, 40])
def test_kernels(arguments, side):
    compare(2, 24, 40, side, side + 1, **arguments)


@settings(deadline=None, max_examples=30)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 40),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_any_size(images, channels, outputs, height, width):
    with th.autocast("cpu", th.bfloat16):
        compare(images, channels, outputs, height, width, kernel_size=3, padding=1)


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (20, 33, 5, 5), (3, 16, 1, 1), (1, 1, 2, 7)])
def test_weights_are_cast_as_torch_does(shape):
    weight = th.randn(shape)
    cast = convolution._to_bf16(weight)
    assert th.equal(cast, weight.bfloat16())
    assert th.equal(convolution._to_fp32(cast), cast.float())


@pytest.mark.parametrize("side", [4, 40])
def test_only_what_is_needed_is_computed(side):
    conv = conv_nd(2, 16, 16, 3, padding=1).requires_grad_(False)
    x = th.randn(2, 16, side, side, requires_grad=True)
    conv(x).float().sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None
    conv.weight.requires_grad_()
    conv(x.detach()).float().sum().backward()
    assert conv.weight.grad is not None
    assert conv.bias.grad is None


def test_weights_changed_between_forward_and_backward_are_an_error():
    conv = conv_nd(2, 16, 16, 3, padding=1)
    y = conv(th.randn(2, 16, 4, 4))
    with th.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


def test_what_is_left_to_torch():
    conv = conv_nd(2, 16, 16, 3, groups=2)
    assert not convolution.serves(th.randn(1, 16, 8, 8), conv.weight, conv.groups)
    with th.autocast("cpu", enabled=False):
        conv = conv_nd(2, 16, 16, 3)
        assert not convolution.serves(th.randn(1, 16, 8, 8), conv.weight, 1)
