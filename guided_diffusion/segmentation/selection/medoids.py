"""k-medoids: the k points of a set that together lie nearest to all of its points.

BUILD and the exchanges of PAM (Kaufman and Rousseeuw, Finding Groups in Data, 1990, chapter 2), the
gains of the exchanges as in FastPAM (arXiv 1810.05691). Nothing is random. Distances are computed a
block at a time, so that the memory grows with the number of points and not with its square.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# distances in memory at once
_BLOCK = 1 << 22
# a smaller gain, as a share of all distances, is rounding
_LEAST_GAIN = 1e-6
_MOST_PASSES = 20


@dataclass(frozen=True)
class Medoids:
    """Chosen points, the best first, and what each stands for.

    chosen: indices [k]; the first k' of them are a selection of k'.
    nearest: of each point, the place in `chosen` of the medoid that stands for it, -1 for a given
    one [N].
    distance: from each point to that medoid, float32 [N].
    reached: mean distance to the nearest of the first 1, 2, ..., k medoids, or a given one [k].
    known: distance from each point to the nearest given one [N]; None if there is none.
    """

    chosen: list[int]
    nearest: np.ndarray
    distance: np.ndarray
    reached: list[float]
    known: np.ndarray | None = None


def choose_medoids(
    points: np.ndarray, k: int, groups: Sequence[int], given: Sequence[int] = ()
) -> Medoids:
    """Choose k points, at most one of each group.

    :param points: float32 [N x D].
    :param groups: of each point; at least k different ones without those of `given`.
    :param given: indices of points that are medoids already, and stay so.
    """
    search = _Search(points, np.asarray(groups), given)
    search.build(k)
    search.exchange()
    return search.ordered()


class _Search:
    """A selection on its way to the best one."""

    def __init__(self, points: np.ndarray, groups: np.ndarray, given: Sequence[int] = ()):
        self.points, self.groups = points, groups
        self.squares = np.einsum("nd,nd->n", points, points)
        self.chosen: list[int] = []
        self.used = np.isin(groups, groups[list(given)])  # points of the groups of given ones
        # from each point to the nearest of the given ones
        self.known = np.full(len(points), np.inf, np.float32)
        for index in given:
            self.known = np.minimum(self.known, self.distances([index])[:, 0])

    def distances(self, columns: Sequence[int] | np.ndarray) -> np.ndarray:
        """From every point to some of them, float32 [N x len(columns)]."""
        products = self.points @ self.points[columns].T
        found = self.squares[:, None] + self.squares[columns] - 2 * products
        found = np.sqrt(found.clip(0), out=found)
        found[columns, range(len(columns))] = 0  # else rounding would leave a remainder
        return found

    def blocks(self, candidates: np.ndarray) -> Iterator[np.ndarray]:
        size = max(1, _BLOCK // len(self.points))
        for start in range(0, len(candidates), size):
            yield candidates[start : start + size]

    def build(self, k: int) -> None:
        """Add one point after the other, each time the one that shortens the distances most.

        What a point gains only shrinks as others are added, so most need not be looked at again.
        """
        # farther than any point from any other: the first point gains by what it is nearer
        near = np.minimum(np.sqrt(self.squares) + np.sqrt(self.squares.max()), self.known)
        bounds = np.full(len(self.points), np.inf)
        while len(self.chosen) < k:
            free = np.flatnonzero(~np.isin(self.groups, self.groups[self.chosen]) & ~self.used)
            order = free[np.argsort(-bounds[free], kind="stable")]
            best = -1.0
            for block in self.blocks(order):
                if bounds[block[0]] < best:
                    break
                gains = (near[:, None] - self.distances(block)).clip(0).sum(0, dtype=np.float64)
                bounds[block] = gains
                best = max(best, float(gains.max()))
            added = int(free[bounds[free].argmax()])
            self.chosen.append(added)
            near = np.minimum(near, self.distances([added])[:, 0])

    def exchange(self) -> None:
        """Exchange medoids for other points for as long as that shortens the distances."""
        everyone = np.arange(len(self.points))
        for _ in range(_MOST_PASSES):
            before = list(self.chosen)
            for block in self.blocks(everyone):
                self._best_exchange(block)
            if self.chosen == before:
                return

    def _best_exchange(self, block: np.ndarray) -> None:
        """Do the best exchange for a point of a block, if one is worth it."""
        k = len(self.chosen)
        to_medoids = np.column_stack([self.distances(self.chosen), self.known])
        owner = to_medoids.argmin(1)
        near = to_medoids.min(1)
        to_medoids[range(len(owner)), owner] = np.inf
        second = to_medoids.min(1)[:, None]
        candidate = self.distances(block)
        # [k x block]: what all points gain, less what those of the medoid lose beyond that
        gained = (near[:, None] - candidate).clip(0).sum(0, dtype=np.float64)
        lost = np.minimum(np.maximum(candidate, near[:, None]), second) - near[:, None]
        owned = (owner == np.arange(k)[:, None]).astype(np.float32)
        change = owned @ lost - gained
        change[~self._allowed(block)] = np.inf
        medoid, column = np.unravel_index(change.argmin(), change.shape)
        if change[medoid, column] < -_LEAST_GAIN * near.sum(dtype=np.float64):
            self.chosen[medoid] = int(block[column])

    def _allowed(self, block: np.ndarray) -> np.ndarray:
        """Whether each medoid may go for each point, by the groups of the others: [k x block]."""
        taken = self.groups[self.chosen][:, None] == self.groups[block]
        return ((taken.sum(0) - taken) == 0) & ~self.used[block]

    def ordered(self) -> Medoids:
        """The medoids in the order in which each shortens the remaining distances most."""
        to_medoids = self.distances(self.chosen)
        order: list[int] = []
        reached: list[float] = []
        near = self.known
        while len(order) < len(self.chosen):
            rest = [place for place in range(len(self.chosen)) if place not in order]
            sums = np.minimum(near[:, None], to_medoids[:, rest]).sum(0, dtype=np.float64)
            order.append(rest[int(sums.argmin())])
            near = np.minimum(near, to_medoids[:, order[-1]])
            reached.append(float(sums.min()) / len(near))
        to_medoids = to_medoids[:, order]
        chosen = [self.chosen[place] for place in order]
        nearest, distance = to_medoids.argmin(1), to_medoids.min(1)
        nearest[chosen] = np.arange(len(chosen))  # of equal points too
        nearest[self.known < distance] = -1
        known = self.known if np.isfinite(self.known).all() else None
        return Medoids(chosen, nearest, np.minimum(distance, self.known), reached, known)
