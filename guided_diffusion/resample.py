"""Which timesteps to train on: uniformly, or more often those whose losses are large."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from .gaussian_diffusion import GaussianDiffusion
from .runtime.errors import UserError
from .runtime.ranks.devices import of_float64


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> "ScheduleSampler":
    """The sampler called `uniform` or `loss-second-moment`, for the timesteps of the diffusion.

    :raises UserError: another name.
    """
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise UserError(f"unknown schedule sampler '{name}': choose {' or '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over timesteps. Losses are weighted so that their mean keeps its expectation
    (importance sampling, section 3.3 of arXiv 2102.09672)."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive numbers [T] to which the probabilities are proportional."""

    def sample(
        self, batch_size: int, device: th.device | str, uniforms: np.ndarray | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Draw timesteps for a batch.

        :param uniforms: [N] numbers in [0, 1) that decide the timesteps, for a draw that is a
            function of its inputs; numpy's global generator where None.
        :return: timesteps int64 [N] and the weights float32 [N] of their losses, 1 / (T p(t)).
        """
        weights = np.asarray(self.weights(), dtype=np.float64)
        probabilities = weights / weights.sum()
        if uniforms is None:
            uniforms = np.random.random_sample(batch_size)  # noqa: NPY002 - the seed is the user's
        uniforms = np.asarray(uniforms, dtype=np.float64)
        if uniforms.shape != (batch_size,):
            raise ValueError(f"{batch_size} uniform numbers expected, shape {uniforms.shape} given")
        # Inverse of the distribution function; dividing by its end keeps rounding from leaving a
        # gap below 1.
        distribution = np.cumsum(probabilities)
        indices = np.searchsorted(distribution / distribution[-1], uniforms, side="right")
        importance = 1.0 / (len(probabilities) * probabilities[indices])
        return (
            th.from_numpy(indices.astype(np.int64)).to(device),
            th.from_numpy(importance.astype(np.float32)).to(device),
        )

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to go on after a restart."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        if state:
            raise UserError(
                f"this schedule sampler keeps no state, the checkpoint holds {sorted(state)}: "
                f"resume with the --schedule_sampler of the first run"
            )


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that follows the losses. The trainer tells it of every batch."""

    def update_with_local_losses(self, local_ts: th.Tensor, local_losses: th.Tensor) -> None:
        """Take in the losses of this rank's batch together with those of all other ranks.

        A collective call where a process group is initialised: every rank must make it. The ranks'
        batches may differ in size; all ranks end in the same state.

        :param local_ts: int64 [N] timesteps.
        :param local_losses: [N] unweighted losses at them, on the device that the ranks' backend
            communicates from.
        """
        losses = local_losses.detach().to(of_float64(local_losses.device)).double()
        ts = local_ts.detach().to(losses.device)
        if dist.is_available() and dist.is_initialized():
            ts, losses = _gather(ts), _gather(losses)
        self.update_with_all_losses(ts.tolist(), losses.tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Take in the losses of all ranks; a pure function of the state and the arguments.

        :param ts: timesteps.
        :param losses: the loss at each of them.
        """


class LossSecondMomentResampler(LossAwareSampler):
    """Timesteps in proportion to the root of the mean squared loss at them.

    Equation 18 of arXiv 2102.09672, over the last losses of each timestep; uniform until every
    timestep has as many. Losses that are not finite are left out.

    :param history_per_term: losses to remember of each timestep.
    :param uniform_prob: share of the draws that stays uniform.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
    ) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        # A row is a ring: loss number n of a timestep stands at n modulo history_per_term.
        self._history = np.zeros((diffusion.num_timesteps, history_per_term))
        self._seen = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        if (self._seen < self.history_per_term).any():
            return np.ones(len(self._seen))
        root_mean_square = np.sqrt(np.mean(self._history**2, axis=1))
        total = root_mean_square.sum()
        if total == 0:
            return np.ones(len(self._seen))
        uniform = self.uniform_prob / len(self._seen)
        return root_mean_square / total * (1 - self.uniform_prob) + uniform

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses):
            if np.isfinite(loss):
                self._history[t, self._seen[t] % self.history_per_term] = loss
                self._seen[t] += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": th.from_numpy(self._history.copy()),
            "seen": th.from_numpy(self._seen.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "history" not in state or tuple(state["history"].shape) != self._history.shape:
            found = tuple(state["history"].shape) if "history" in state else "none"
            raise UserError(
                f"the checkpoint's history of losses has shape {found}, this run's "
                f"{self._history.shape}: resume with the --schedule_sampler, --diffusion_steps and "
                f"--timestep_respacing of the first run"
            )
        self._history = state["history"].cpu().numpy().astype(np.float64)
        self._seen = state["seen"].cpu().numpy().astype(np.int64)


def _gather(values: th.Tensor) -> th.Tensor:
    """[N] of every rank -> [sum of N], in the order of the ranks."""
    world = dist.get_world_size()
    size = th.tensor([len(values)], device=values.device)
    sizes = [th.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    lengths = [int(n) for n in sizes]
    # all_gather wants one shape on all ranks.
    padded = values.new_zeros(max(lengths))
    padded[: len(values)] = values
    parts = [th.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return th.cat([part[:length] for part, length in zip(parts, lengths)])
