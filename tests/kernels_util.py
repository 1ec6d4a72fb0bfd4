"""Shared by the tests of compiled kernels."""

from collections.abc import Callable, Sequence

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


def same_on_any_threads(compute: Callable[[], Sequence[th.Tensor]]) -> bool:
    """Whether 1, 2 and 4 threads give results that are equal to the bit."""
    threads, results = th.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            th.set_num_threads(number)
            results.append(compute())
    finally:
        th.set_num_threads(threads)
    return all(th.equal(*pair) for more in results[1:] for pair in zip(more, results[0]))
