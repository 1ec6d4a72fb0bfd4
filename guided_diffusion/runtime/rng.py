"""Random numbers as pure functions of a seed and their purpose.

There is no generator state that a resumed run would have to restore: the noise of the n-th image of
a run is the same whichever rank draws it, in whichever batch, before or after a restart.
"""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch as th


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed derived from the run's, a purpose ("noise", ...) and numbers (step, ...)."""
    entropy = [seed, crc32(purpose.encode()), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniforms(seed: int, purpose: str, indices: Sequence[int]) -> np.ndarray:
    """One uniform number in [0, 1) per index: float64 `[len(indices)]`."""
    seeds = (derive_seed(seed, purpose, index) for index in indices)
    return np.array([np.random.default_rng(s).random() for s in seeds])


def normal(
    seed: int,
    purpose: str,
    indices: Sequence[int],
    shape: Sequence[int],
    device: th.device | str = "cpu",
) -> th.Tensor:
    """Standard normal float32 `[len(indices) x *shape]`; each row depends only on its own index.

    The numbers differ between CPU and CUDA, whose generators differ.
    """
    out = th.empty(len(indices), *shape, device=device)
    generator = th.Generator(device)
    for row, index in zip(out, indices):
        row.normal_(generator=generator.manual_seed(derive_seed(seed, purpose, index)))
    return out
