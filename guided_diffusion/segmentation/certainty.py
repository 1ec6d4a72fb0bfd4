"""How certain class probabilities are, and how much they count beside those of another network."""

import math

import torch as th

# added to the mean entropy: a network without any doubt counts no more than this allows
FLOOR = 1e-4


def entropy(probabilities: th.Tensor, dim: int) -> th.Tensor:
    """Shannon entropy over the classes as a share of its maximum, log C: 0 to 1.

    0 where one class is certain, 1 where all are equally likely.

    :param probabilities: C of them along `dim`, which the result lacks.
    """
    # rounding in float32 can push the sum slightly outside 0 to 1
    terms = th.special.entr(probabilities.clamp(0, 1)).sum(dim)
    return (terms / math.log(max(2, probabilities.shape[dim]))).clamp(0, 1)


def certainty(probabilities: th.Tensor) -> th.Tensor:
    """How much each of N predictions counts in a mean with other networks' predictions: the
    inverse square of its entropy, averaged over the pixels, as in a mean by inverse variances.

    Networks that learnt from the same few masks doubt where they fail, so the one that suits these
    radiographs less counts less. Measured in docs/label-efficiency.md.

    :param probabilities: `[N x C x H x W]`.
    :return: `[N]`, above 0, in no particular unit.
    """
    return (entropy(probabilities, 1).mean((1, 2)) + FLOOR) ** -2
