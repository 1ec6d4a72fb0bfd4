"""Likelihoods of Gaussian diffusion: divergence of two Gaussians, log-probability of pixels."""

import math

import torch as th

# Pixels are the 256 levels k / 127.5 - 1; half the distance between two of them.
_HALF_LEVEL = 1.0 / 255.0
# Within this distance of -1 or 1 a pixel is the darkest or the brightest level.
_EDGE = 0.999
# Keeps the logarithm of a vanishing probability finite in float32.
_TINY = 1e-12


def normal_kl(
    mean1: th.Tensor | float,
    logvar1: th.Tensor | float,
    mean2: th.Tensor | float,
    logvar2: th.Tensor | float,
) -> th.Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) of every element, in nats.

    Arguments broadcast against each other; numbers and tensors mix, all numbers give a 0-d tensor.
    """
    tensors = [v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, th.Tensor)]
    like = tensors[0] if tensors else th.zeros(())
    mean1, logvar1, mean2, logvar2 = (
        v if isinstance(v, th.Tensor) else th.full((), v, dtype=like.dtype, device=like.device)
        for v in (mean1, logvar1, mean2, logvar2)
    )
    log_ratio = logvar1 - logvar2
    squared_distance = (mean1 - mean2).square() * (-logvar2).exp()
    # In this order: near equality all that is left is rounding, and recorded likelihoods hold it.
    return 0.5 * (-1.0 - log_ratio + log_ratio.exp() + squared_distance)


def approx_standard_normal_cdf(x: th.Tensor) -> th.Tensor:
    """Cumulative distribution function of N(0, 1), to 2e-4 absolute.

    The tanh approximation of Page (1977), the one that also serves in GELU (arXiv 1606.08415).
    """
    return 0.5 + 0.5 * th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


def discretized_gaussian_log_likelihood(
    x: th.Tensor, *, means: th.Tensor, log_scales: th.Tensor
) -> th.Tensor:
    """Log-probability, in nats, that a Gaussian gives to the 8-bit level of every pixel.

    Equation 13 of arXiv 2006.11239: the density is integrated over the level's interval, which for
    the darkest and the brightest level reaches out to infinity.

    :param x: [N x ...] images in [-1, 1] that were 8-bit integers, rescaled.
    :param means: [N x ...] means of the Gaussians.
    :param log_scales: [N x ...] logarithms of their standard deviations.
    :return: [N x ...], never below log(1e-12).
    """
    if not x.shape == means.shape == log_scales.shape:
        shapes = ", ".join(str(tuple(v.shape)) for v in (x, means, log_scales))
        raise ValueError(f"x, means and log_scales must have one shape, not {shapes}")
    distance = x - means
    precision = th.exp(-log_scales)
    below_upper = approx_standard_normal_cdf(precision * (distance + _HALF_LEVEL))
    below_lower = approx_standard_normal_cdf(precision * (distance - _HALF_LEVEL))
    probability = th.where(
        x < -_EDGE,
        below_upper,
        th.where(x > _EDGE, 1.0 - below_lower, below_upper - below_lower),
    )
    return probability.clamp(min=_TINY).log()
