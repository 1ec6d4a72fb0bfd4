"""Deterministic weights and inputs from names: recorded numbers need no recorded tensors."""

from pathlib import Path
from zlib import crc32

import numpy as np
import torch as th

GOLDEN = Path(__file__).parent / "golden"


def tensor(tag: str, *shape: int) -> th.Tensor:
    """Standard normal float32 tensor of the given shape, a pure function of `tag`."""
    values = np.random.default_rng(crc32(tag.encode())).standard_normal(shape)
    return th.from_numpy(values.astype(np.float32))


def relative(actual: th.Tensor, expected: np.ndarray | th.Tensor) -> float:
    """Largest difference, as a share of the largest expected magnitude."""
    expected = th.from_numpy(np.asarray(expected))
    return float((actual - expected).abs().max() / expected.abs().max())


def fill_parameters(model: th.nn.Module) -> th.nn.Module:
    """Overwrite every parameter with numbers drawn from its name: 0.1 z, and 1 + 0.1 z for the
    vectors called `weight` (the gains of the normalisation layers). Returns the model."""
    with th.no_grad():
        for name, parameter in model.named_parameters():
            generator = np.random.default_rng(crc32(name.encode()))
            values = generator.standard_normal(tuple(parameter.shape)) * 0.1
            if parameter.ndim == 1 and name.endswith("weight"):
                values = values + 1
            parameter.copy_(th.from_numpy(values.astype(np.float32)))
    return model
