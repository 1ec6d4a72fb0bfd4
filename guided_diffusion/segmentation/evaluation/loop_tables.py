"""Tables of a simulated loop: the rules of choosing side by side, by seed and round."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from guided_diffusion.runtime.storage.files import write_csv
from guided_diffusion.segmentation.evaluation.efficiency_tables import (
    RunResult,
    score_text,
    spread,
)
from guided_diffusion.segmentation.evaluation.statistics import (
    FEWEST_PAIRS,
    SIGNIFICANCE,
    permutation,
)


class LoopTable:
    """Mean Dice of the runs of a loop.

    :param results: of the runs that have finished, of these rules or of others too.
    :param rules: names; the others are compared with the first.
    :param numbers: of labelled images, by round.
    """

    def __init__(
        self,
        results: Sequence[RunResult],
        rules: Sequence[str],
        numbers: Sequence[int],
        seeds: Sequence[int],
    ):
        self.rules, self.numbers, self.seeds = rules, numbers, seeds
        self._dice = {(r["method"], r["k"], r["seed"]): r["mean_dice"] for r in results}

    def dice(self, rule: str, round_: int, seed: int) -> float | None:
        return self._dice.get((rule, self.numbers[round_], seed))

    def ahead(self, rule: str, round_: int, seed: int) -> float | None:
        """Dice of the first rule minus that of another."""
        first, other = (self.dice(one, round_, seed) for one in (self.rules[0], rule))
        return None if first is None or other is None else first - other

    def ahead_over_rounds(self, rule: str) -> list[float]:
        """`ahead`, as the mean over the rounds, of each seed that has finished them all."""
        rounds = range(1, len(self.numbers))
        by_seed = [[self.ahead(rule, number, seed) for number in rounds] for seed in self.seeds]
        finished = [[one for one in found if one is not None] for found in by_seed]
        return [float(np.mean(found)) for found in finished if len(found) == len(rounds)]

    def write(self, folder: str) -> None:
        """Write rounds.csv: a row for each seed and round."""
        rows = ([*key, *(_cell(value) for value in values)] for key, values in self._rows())
        write_csv(os.path.join(folder, "rounds.csv"), self._titles(), rows)

    def markdown(self) -> str:
        """The rows of rounds.csv, and the difference over all rounds."""
        titles, others = self._titles(), self.rules[1:]
        lines = ["", "Mean Dice by seed and round:", ""]
        lines += [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
        for key, values in self._rows():
            scores = [score_text(value) for value in values[: len(self.rules)]]
            changes = ["" if v is None else f"{v:+.4f}" for v in values[len(self.rules) :]]
            lines.append(f"| {' | '.join([*map(str, key), *scores, *changes])} |")
        lines += ["", *map(self._verdict, others)] if others else []
        return "\n".join(lines) + "\n"

    def _titles(self) -> list[str]:
        first, *others = self.rules
        return ["seed", "round", "labelled", *self.rules, *(f"{first} - {o}" for o in others)]

    def _rows(self) -> Iterator[tuple[tuple[int, int, int], list[float | None]]]:
        """(seed, round, labelled images), and the figures."""
        for seed in self.seeds:
            for number, labelled in enumerate(self.numbers):
                values = [self.dice(rule, number, seed) for rule in self.rules]
                if any(value is not None for value in values):
                    others = self.rules[1:]
                    changes = [self.ahead(rule, number, seed) for rule in others]
                    yield (seed, number, labelled), [*values, *changes]

    def _verdict(self, rule: str) -> str:
        found = self.ahead_over_rounds(rule)
        title = f"{self.rules[0]} minus {rule}, the mean over rounds 1 to {len(self.numbers) - 1}"
        if not found:
            return f"- {title}: no seed has finished its rounds."
        mean, p = spread(found), permutation(np.array(found))
        error = f" ± {mean.deviation / mean.runs**0.5:.3f}" if mean.runs > 1 else ""
        text = (
            f"- {title}: {mean.mean:+.3f}{error} (standard error, n = {mean.runs} seeds), above 0"
            f" in {sum(one > 0 for one in found)} of them, p = {p:.2g} by permutation"
        )
        if mean.runs < FEWEST_PAIRS or p >= SIGNIFICANCE:
            return f"{text}: not established, it may be chance."
        return f"{text}."


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
