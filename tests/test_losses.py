"""Divergences and pixel likelihoods against torch's distributions."""

import math

import pytest
import torch as th
from golden_util import tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)


def test_normal_kl_is_the_divergence_of_torch():
    m1, v1, m2, v2 = (tensor(f"kl/{i}", 4, 5).double() for i in range(4))
    distributions = [th.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m1, v1), (m2, v2))]
    expected = th.distributions.kl_divergence(*distributions)
    assert th.allclose(normal_kl(m1, v1, m2, v2), expected)
    standard = th.distributions.Normal(th.zeros(()).double(), th.ones(()).double())
    expected = th.distributions.kl_divergence(distributions[0], standard)
    assert th.allclose(normal_kl(m1, v1, 0.0, 0.0), expected)
    assert normal_kl(1.0, 0.0, 0.0, 0.0).item() == 0.5


def test_normal_cdf():
    x = th.linspace(-6, 6, 1001).double()
    assert (approx_standard_normal_cdf(x) - th.special.ndtr(x)).abs().max() < 2e-4


@given(st.floats(-1.2, 1.2), st.floats(-4, 0))
@settings(max_examples=40, deadline=None)
def test_pixel_likelihoods_sum_to_one(mean, log_scale):
    levels = th.arange(256).double() / 127.5 - 1
    log_p = discretized_gaussian_log_likelihood(
        levels, means=th.full_like(levels, mean), log_scales=th.full_like(levels, log_scale)
    )
    # A probability below 1e-12 is reported as 1e-12.
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-8)
    assert log_p.min() >= math.log(1e-12) - 1e-9


def test_pixel_likelihood_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"one shape, not \(2,\), \(3,\), \(2,\)"):
        discretized_gaussian_log_likelihood(th.zeros(2), means=th.zeros(3), log_scales=th.zeros(2))
