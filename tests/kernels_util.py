"""Shared by the tests of compiled kernels."""

import pytest
import torch as th

from guided_diffusion.kernels.library import library

needs_kernels = pytest.mark.skipif(
    library() is None, reason="the compiled kernels need AVX-512 and a C compiler at installation"
)


def relative(found: th.Tensor, expected: th.Tensor, least: float = 1e-12) -> float:
    """Norm of the difference over the norm of what is expected, which counts as `least` or more."""
    difference = found.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm().clamp_min(least))
