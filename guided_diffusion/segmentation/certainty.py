"""How certain class probabilities are, and how much they count beside those of another network."""

import math

import torch as th

# certainty is (mean entropy + FLOOR) ** POWER: without any doubt it is no higher than FLOOR allows
FLOOR, POWER = 1e-4, -2


def entropy(probabilities: th.Tensor, dim: int) -> th.Tensor:
    """Shannon entropy over the classes as a share of its maximum, log C: 0 to 1.

    0 where one class is certain, 1 where all are equally likely.

    :param probabilities: C of them along `dim`, which the result lacks.
    """
    # rounding in float32 can push the sum slightly outside 0 to 1
    terms = th.special.entr(probabilities.clamp(0, 1)).sum(dim)
    return (terms / math.log(max(2, probabilities.shape[dim]))).clamp(0, 1)


def certainty(entropies: th.Tensor) -> th.Tensor:
    """How much each of N predictions counts in a mean with other networks' predictions: the inverse
    square of its mean entropy, as in a mean weighted by inverse variances.

    A network that suits a radiograph less is less certain of it, and so counts less. Measured in
    docs/label-efficiency.md.

    :param entropies: `entropy` of the predictions, `[N x H x W]`.
    :return: `[N]`, above 0, in no particular unit.
    """
    return (entropies.mean((1, 2)) + FLOOR) ** POWER
