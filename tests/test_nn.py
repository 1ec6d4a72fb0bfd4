"""Layers: the 3x3 convolution with its own weight gradient."""

import pytest
import torch as th
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion import nn
from guided_diffusion.nn import checkpoint, conv_nd, weight_gradient_3x3


def gradients(call, *tensors):
    """Of a weighted sum of the output."""
    output = call(*tensors)
    weights = th.linspace(-1, 1, output.numel()).view_as(output)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return output, th.autograd.grad((output * weights).sum(), wanted)


@pytest.fixture(autouse=True)
def as_without_avx512(monkeypatch):
    monkeypatch.setattr(nn, "usable", lambda x: False)
    monkeypatch.setattr(nn, "_SLOW_WEIGHT_GRADIENT", True)
    monkeypatch.setattr(nn, "_products_pay", lambda channels, positions: channels >= 8)


@settings(deadline=None, max_examples=25)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 20),
    outputs=st.integers(1, 20),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_weight_gradient(images, channels, outputs, height, width):
    generator = th.Generator().manual_seed(0)
    x = th.randn(images, channels, height, width, generator=generator, dtype=th.float64)
    grad = th.randn(images, outputs, height, width, generator=generator, dtype=th.float64)
    weight = th.zeros(outputs, channels, 3, 3, dtype=th.float64, requires_grad=True)
    (expected,) = th.autograd.grad(F.conv2d(x, weight, padding=1), weight, grad)
    th.testing.assert_close(weight_gradient_3x3(x, grad), expected)


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, True), (True, False, True)])
@pytest.mark.parametrize("recompute", [False, True])
def test_convolution_is_torchs(needed, recompute):
    conv = conv_nd(2, 16, 8, 3, padding=1)
    x = th.randn(2, 16, 6, 5)
    tensors = [
        t.detach().clone().requires_grad_(n) for t, n in zip((x, conv.weight, conv.bias), needed)
    ]
    plain = gradients(lambda *t: F.conv2d(*t, padding=1), *tensors)

    def call(x, weight, bias):
        conv.weight, conv.bias = (th.nn.Parameter(t, t.requires_grad) for t in (weight, bias))
        return checkpoint(conv, (x,), conv.parameters(), recompute)

    output = call(*tensors)
    weights = th.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).sum().backward()
    ours = [t.grad for t in (tensors[0], conv.weight, conv.bias) if t.requires_grad]
    th.testing.assert_close(output, plain[0])
    th.testing.assert_close(ours, list(plain[1]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 1},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
    ],
)
def test_other_convolutions_are_left_to_torch(arguments):
    conv, plain = conv_nd(2, 16, 16, **arguments), th.nn.Conv2d(16, 16, **arguments)
    plain.load_state_dict(conv.state_dict())
    x = th.randn(2, 16, 8, 8)
    th.testing.assert_close(conv(x), plain(x))
    assert "Convolution3x3" not in type(conv(x).grad_fn).__name__


def test_frozen_weights_and_autocast_are_left_to_torch():
    conv, x = conv_nd(2, 16, 16, 3, padding=1), th.randn(1, 16, 4, 4)
    assert "Convolution3x3" in type(conv(x).grad_fn).__name__
    with th.autocast("cpu", th.bfloat16):
        assert conv(x).dtype == th.bfloat16
    conv.weight.requires_grad_(False)
    assert "Convolution3x3" not in type(conv(x).grad_fn).__name__


def plain_silu(norm, x, scale, shift):
    y = F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y if scale is None else y * (1 + scale) + shift)


@pytest.mark.parametrize("shape", [(2, 48, 5, 6), (1, 32, 7), (2, 32, 3, 4, 5)])
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_norm_and_silu(shape, steered, frozen):
    norm = nn.normalization(shape[1])
    for parameter in norm.parameters():
        th.nn.init.normal_(parameter)
        parameter.requires_grad_(not frozen)
    x = (3 + 2 * th.randn(shape)).requires_grad_()
    steers = [None, None]
    if steered:
        sides = (*shape[:2], *(1 for _ in shape[2:]))
        steers = [th.randn(sides, requires_grad=True) for _ in range(2)]
    wanted = [t for t in (x, norm.weight, norm.bias, *steers) if t is not None and t.requires_grad]
    found, expected = ([], [])
    for call, grads in ((norm.silu, found), (lambda *t: plain_silu(norm, *t), expected)):
        output = call(x, *steers)
        weights = th.linspace(-1, 1, output.numel()).view_as(output)
        grads += [output, *th.autograd.grad((output * weights).sum(), wanted)]
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with th.no_grad():
        before = x.clone()
        th.testing.assert_close(norm.silu(x, *steers), expected[0].detach())
        assert th.equal(x, before)


@pytest.mark.parametrize("grad", [False, True])
def test_norm_and_silu_in_half_precision(grad):
    norm = nn.normalization(32)
    x = (3 + 2 * th.randn(2, 32, 8, 8)).bfloat16()
    scale, shift = th.randn(2, 2, 32, 1, 1).bfloat16()
    with th.set_grad_enabled(grad), th.autocast("cpu", th.bfloat16):
        output = norm.silu(x, scale, shift)
    assert output.dtype == th.bfloat16
    th.testing.assert_close(output.float(), plain_silu(norm, x, scale, shift), rtol=2e-2, atol=5e-2)


def test_norm_and_silu_keeps_its_input_alone():
    norm, kept = nn.normalization(32), []
    x = th.randn(1, 32, 16, 16, requires_grad=True)

    def pack(tensor):
        kept.append(tensor.numel() * (tensor.data_ptr() != x.data_ptr()))
        return tensor

    with th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm.silu(x)
    assert sum(kept) == 2 * 32
