"""Group normalisation, scale, shift and SiLU over channels last, against torch in float64."""

import math

import pytest
import torch as th
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_util import needs_kernels, relative, same_on_any_threads

from guided_diffusion.kernels import norms

BOUNDS = {th.float32: 2e-6, th.bfloat16: 6e-3}
pytestmark = needs_kernels


def expected(x, weight, bias, groups, steer, silu):
    y = F.group_norm(x, groups, weight, bias, 1e-5)
    if steer is not None:
        scale, shift = steer.chunk(2, 1)
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def compare(images, channels, height, width, dtype, steered, silu, offset=0.0, spread=1.0):
    generator = th.Generator().manual_seed(0)

    def random(*shape):
        return th.randn(*shape, generator=generator)

    groups = math.gcd(32, channels)
    x = (random(images, channels, height, width) * spread + offset).to(dtype)
    x = x.contiguous(memory_format=th.channels_last)
    weight, bias = random(channels), random(channels)
    steer = random(images, 2 * channels, 1, 1) if steered else None
    grad = random(images, channels, height, width).to(dtype)
    inputs = [t for t in (x, weight, bias, steer) if t is not None]
    ours = [t.detach().clone(memory_format=th.preserve_format).requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    assert norms.serves(ours[0]) == (x.numel() > 0)
    parts = ours[3].chunk(2, 1) if steered else ()
    y = norms.norm_silu(*ours[:3], groups, 1e-5, *parts, silu=silu)
    z = expected(*exact[:3], groups, exact[3] if steered else None, silu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=th.channels_last)
    found = [y, *th.autograd.grad(y, ours, grad)]
    wanted = [z, *th.autograd.grad(z, exact, grad.double())]
    for name, one, other in zip(("y", "x", "weight", "bias", "steer"), found, wanted):
        assert one.shape == other.shape
        # the others are sums over positions, and may nearly cancel out
        terms = x.numel() / channels if name in ("weight", "bias", "steer") else 0
        least = 0.1 * (terms * other.numel()) ** 0.5
        assert relative(one, other, least) < BOUNDS[dtype], name


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_outputs_and_gradients(dtype, steered, silu):
    compare(2, 64, 20, 30, dtype, steered, silu)


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 4),
    channels=st.integers(1, 140),
    # of a group of few numbers hardly any gradient is left: rounding errors alone
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    dtype=st.sampled_from(list(BOUNDS)),
    steered=st.booleans(),
)
def test_any_size(images, channels, height, width, dtype, steered):
    compare(images, channels, height, width, dtype, steered, True)


def test_a_mean_far_from_zero_loses_no_digits():
    """The sum of squares minus the square of the sum would."""
    generator = th.Generator().manual_seed(0)
    x = th.randn(2, 32, 40, 40, generator=generator) + 1000
    x = x.contiguous(memory_format=th.channels_last)
    y = norms.norm_silu(x, th.ones(32), th.zeros(32), 32, 1e-5, silu=False)
    assert relative(y, F.group_norm(x.double(), 32)) < 1e-4
    assert abs(y.mean()) < 1e-4


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_wrong_number_is_not_hidden(dtype, value):
    x = th.zeros(1, 32, 4, 4, dtype=dtype).contiguous(memory_format=th.channels_last)
    x[0, 3, 2, 2] = value
    y = norms.norm_silu(x, th.ones(32), th.zeros(32), 16, 1e-5)
    assert not th.isfinite(y[0, 2:4]).any()
    assert th.isfinite(y[0, 4:]).all()


@pytest.mark.parametrize("images", [1, 3])
def test_the_number_of_threads_changes_nothing(images):
    generator = th.Generator().manual_seed(0)
    x = th.randn(images, 48, 40, 40, generator=generator)
    x = x.contiguous(memory_format=th.channels_last).requires_grad_()

    def compute():
        y = norms.norm_silu(x, th.ones(48), th.zeros(48), 16, 1e-5)
        return y.detach(), *th.autograd.grad(y.square().sum(), x)

    assert same_on_any_threads(compute)


def test_frozen_weights_and_inputs():
    x = th.randn(2, 32, 4, 4).contiguous(memory_format=th.channels_last)
    weight = th.ones(32, requires_grad=True)
    y = norms.norm_silu(x, weight, th.zeros(32), 32, 1e-5)
    y.sum().backward()
    assert weight.grad is not None
    x.requires_grad_()
    y = norms.norm_silu(x, th.ones(32), th.zeros(32), 32, 1e-5)
    y.square().sum().backward()
    assert x.grad is not None


def test_what_is_left_to_torch():
    x = th.randn(2, 32, 4, 4)
    assert not norms.serves(x)
    assert not norms.serves(x.double().contiguous(memory_format=th.channels_last))
    assert not norms.serves(x[:0].contiguous(memory_format=th.channels_last))
    assert not norms.serves(x.flatten(2))
