"""A diffusion over only some of the timesteps of a longer one, for faster sampling."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch as th

from .gaussian_diffusion import GaussianDiffusion, network_timesteps
from .runtime.errors import UserError


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Timesteps to retain of a process with `num_timesteps` of them.

    - "ddimN": exactly N timesteps 0, s, 2s, ... with an integer stride (section D.2 of
      arXiv 2010.02502).
    - "A,B,C" or [A, B, C]: the process is cut into as many equal sections as there are numbers (the
      first sections one longer where that does not divide), and of each section so many timesteps
      are taken, evenly spread and with both its ends (section 4 of arXiv 2102.09672 and its
      appendix). One number spreads over the whole process.

    :raises UserError: a text that is none of these, or counts that do not fit.
    """
    if isinstance(section_counts, str):
        spec = section_counts.strip()
        try:
            if spec.startswith("ddim"):
                return _ddim_timesteps(num_timesteps, int(spec[len("ddim") :]))
            section_counts = [int(part) for part in spec.split(",")]
        except UserError:
            raise
        except ValueError:
            raise UserError(
                f"timestep respacing '{section_counts}' is neither 'ddimN' nor numbers separated "
                f"by commas: write for example 250, ddim50 or 10,15,20"
            ) from None
    if not section_counts or min(section_counts) < 1:
        raise UserError(
            f"timestep respacing {list(section_counts)}: every section needs at least 1 timestep"
        )
    length, longer = divmod(num_timesteps, len(section_counts))
    retained: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = length + (1 if i < longer else 0)
        if count > size:
            raise UserError(
                f"timestep respacing asks for {count} of a section of {size} timesteps "
                f"({num_timesteps} in {len(section_counts)} sections): ask for {size} or fewer"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: where a position falls on a half, rounding must fall on the side
        # on which it fell when published models were sampled.
        positions = accumulate(repeat(stride, count - 1), initial=0.0)
        retained.update(start + round(position) for position in positions)
        start += size
    return retained


def _ddim_timesteps(num_timesteps: int, count: int) -> set[int]:
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps)}
    nearest = min(possible, key=lambda n: abs(n - count), default=1)
    raise UserError(
        f"no integer stride takes exactly {count} of {num_timesteps} timesteps: "
        f"the nearest possible is ddim{nearest}; or spread them with '{count}'"
    )


def respaced_betas(alphas_cumprod: np.ndarray, timesteps: Sequence[int]) -> np.ndarray:
    """Variances of the process over some timesteps S_0 < S_1 < ... of a longer one, float64 [S].

    beta_i = 1 - abar_{S_i} / abar_{S_{i-1}}, equation 19 of arXiv 2102.09672.
    """
    abar = alphas_cumprod[timesteps]
    return 1.0 - abar / np.append(1.0, abar[:-1])


class SpacedDiffusion(GaussianDiffusion):
    """The diffusion over a subset of another's timesteps, with the same abar at each of them.

    Its own timesteps are 0 .. len(S) - 1 where S are the retained ones; networks and guidance
    functions receive those of the original process.

    :param use_timesteps: timesteps S of the original process to retain.
    :param kwargs: the arguments of the original GaussianDiffusion.
    :raises UserError: no timestep, or one outside the original process.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        original = GaussianDiffusion(**kwargs)
        self.original_num_steps = original.num_timesteps
        if not self.timestep_map:
            raise UserError("a respaced diffusion needs at least one timestep")
        if self.timestep_map[0] < 0 or self.timestep_map[-1] >= self.original_num_steps:
            raise UserError(
                f"timesteps {self.timestep_map[0]} to {self.timestep_map[-1]} to retain, of a "
                f"diffusion that has 0 to {self.original_num_steps - 1}"
            )
        kwargs["betas"] = respaced_betas(original.alphas_cumprod, self.timestep_map)
        super().__init__(**kwargs)
        self._original_timesteps: dict[th.device, th.Tensor] = {}

    def _network_timesteps(self, t: th.Tensor) -> th.Tensor:
        table = self._original_timesteps.get(t.device)
        if table is None:
            table = th.tensor(self.timestep_map, dtype=th.int64, device=t.device)
            self._original_timesteps[t.device] = table
        return network_timesteps(table[t], self.original_num_steps, self.rescale_timesteps)
