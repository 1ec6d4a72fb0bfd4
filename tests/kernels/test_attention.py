"""Attention over channels last, against torch in float64."""

import pytest
import torch as th
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_util import needs_kernels, relative, same_on_any_threads

from guided_diffusion.kernels import attention as kernel
from guided_diffusion.kernels.library import has_amx

BOUNDS = {th.float32: 3e-6, th.bfloat16: 6e-3}
pytestmark = needs_kernels


def dtypes():
    return list(BOUNDS) if has_amx() else [th.float32]


def expected(qkv, heads, grouped_by_head):
    if grouped_by_head:
        q, k, v = qkv.unflatten(1, (heads, 3, -1)).unbind(2)
    else:
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    scores = th.einsum("nhct,nhcs->nhts", q, k) / q.shape[2] ** 0.5
    return th.einsum("nhts,nhcs->nhct", scores.softmax(-1), v).flatten(1, 2)


def projections(images, heads, positions, channels, dtype, size=1.0):
    generator = th.Generator().manual_seed(0)
    rows = th.randn(images, positions, 3 * heads * channels, generator=generator) * size
    return rows.to(dtype).transpose(1, 2)


def compare(images, heads, positions, channels, dtype, grouped, size=1.0):
    qkv = projections(images, heads, positions, channels, dtype, size).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    assert kernel.serves(qkv, heads)
    out, wanted = kernel.attention(qkv, heads, grouped), expected(exact, heads, grouped)
    assert out.dtype == dtype
    assert out.shape == wanted.shape
    assert out.stride(1) == 1
    grad = th.randn(wanted.shape, generator=th.Generator().manual_seed(1)).to(dtype)
    (found,) = th.autograd.grad(out, qkv, grad)
    (truth,) = th.autograd.grad(wanted, exact, grad.double())
    assert relative(out, wanted) < BOUNDS[dtype] * max(1, size)
    assert relative(found, truth) < BOUNDS[dtype] * max(1, size)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("channels", [32, 64, 96, 256])
def test_outputs_and_gradients(dtype, grouped, channels):
    compare(2, 3, 200, channels, dtype, grouped)


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 3),
    heads=st.integers(1, 4),
    positions=st.integers(1, 300),
    channels=st.sampled_from([32, 64]),
    dtype=st.sampled_from(dtypes()),
    grouped=st.booleans(),
)
def test_any_size(images, heads, positions, channels, dtype, grouped):
    compare(images, heads, positions, channels, dtype, grouped)


@pytest.mark.parametrize("dtype", dtypes())
def test_large_scores_neither_overflow_nor_vanish(dtype):
    """Scores of some hundreds: e^score is beyond float32."""
    qkv = projections(1, 2, 150, 32, dtype, size=8.0)
    out = kernel.attention(qkv, 2, True)
    assert th.isfinite(out).all()
    assert relative(out, expected(qkv.double(), 2, True)) < 30 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", dtypes())
def test_a_wrong_number_is_not_hidden(dtype):
    qkv = projections(1, 1, 100, 32, dtype)
    qkv[0, 5, 7] = th.nan
    assert th.isnan(kernel.attention(qkv, 1, True)).any()


@pytest.mark.parametrize("dtype", dtypes())
def test_the_number_of_threads_changes_nothing(dtype):
    qkv = projections(3, 3, 130, 32, dtype).requires_grad_()

    def compute():
        out = kernel.attention(qkv, 3, True)
        return out.detach(), *th.autograd.grad(out.square().sum(), qkv)

    assert same_on_any_threads(compute)


def test_tiles_are_free_for_others_afterwards():
    """torch's own products use the same registers."""
    left, right = th.randn(64, 64), th.randn(64, 64)
    for _ in range(3):
        for dtype in dtypes():
            kernel.attention(projections(1, 2, 70, 32, dtype), 2, True)
        product = left.bfloat16() @ right.bfloat16()
        assert relative(product, left.double() @ right.double()) < 1e-2


def test_what_is_left_to_torch():
    assert not kernel.serves(projections(1, 2, 10, 48, th.float32), 2)
    assert not kernel.serves(projections(1, 2, 10, 32, th.float32).contiguous(), 2)
    assert not kernel.serves(projections(1, 2, 10, 32, th.float64), 2)
    assert not kernel.serves(projections(1, 2, 10, 32, th.float16), 2)


def test_autocast_decides_the_type():
    qkv = projections(1, 2, 70, 32, th.float32)
    with th.autocast("cpu", th.bfloat16):
        if kernel.serves(qkv, 2):
            assert kernel.attention(qkv, 2, True).dtype == th.bfloat16
    assert kernel.attention(qkv, 2, True).dtype == th.float32


def test_agrees_with_torchs_own():
    q, k, v = projections(2, 4, 90, 32, th.float32).unflatten(1, (4, 3, -1)).unbind(2)
    torchs = F.scaled_dot_product_attention(*(t.transpose(-1, -2) for t in (q, k, v)))
    qkv = projections(2, 4, 90, 32, th.float32)
    found = kernel.attention(qkv, 4, True).unflatten(1, (4, -1)).transpose(-1, -2)
    assert relative(found, torchs) < 1e-5
