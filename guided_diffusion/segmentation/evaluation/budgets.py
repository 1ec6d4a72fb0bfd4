"""The best budget of every method, chosen by folds inside TRAIN: steps, then the learning rate.

A comparison at one budget for all would handicap whoever needs another one.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.evaluation.config import LabelEfficiencyConfig
from guided_diffusion.segmentation.evaluation.draws import find_pairs
from guided_diffusion.segmentation.evaluation.efficiency_plan import Plan, positive_integers
from guided_diffusion.segmentation.evaluation.efficiency_tables import read_results, spread
from guided_diffusion.segmentation.evaluation.efficiency_work import run_all
from guided_diffusion.segmentation.evaluation.methods import Method, comma_separated

_FOLDS = 2
# numbers of labelled images to choose with, the largest that the folds allow
_MOST_NUMBERS = 2


@dataclass(frozen=True)
class Budget:
    """Optimisation steps, and the peak learning rate."""

    steps: int
    lr: float

    def __str__(self) -> str:
        return f"{self.steps} steps at {self.lr:g}"

    def applied(self, method: Method) -> Method:
        """The method with this budget, whatever its own flags say."""
        flags = ("--steps", str(self.steps), "--lr", f"{self.lr:g}")
        return dataclasses.replace(method, flags=(*method.flags, *flags))


@dataclass(frozen=True)
class Choice:
    """Of one method: its budget, and the mean Dice in the folds of every budget considered."""

    budget: Budget
    scores: Mapping[Budget, float]


class BudgetChooser:
    """Chooses by runs of its own in `budgets/` under the output folder; finished ones are reused.

    :param train: folders of radiographs and masks; the test images are never seen.
    """

    def __init__(
        self, settings: LabelEfficiencyConfig, methods: Sequence[Method], train: tuple[str, str]
    ):
        self.methods = [method for method in methods if not method.members]
        self.steps = positive_integers("tune_steps", settings.tune_steps)
        self.rates = _rates(settings.tune_lr)
        half = len(find_pairs(*train).names) // _FOLDS
        numbers = [k for k in sorted(positive_integers("k", settings.k)) if k <= half]
        if not half:
            raise UserError(f"{train[0]}: one image cannot choose a budget: give --steps")
        self.numbers = numbers[-_MOST_NUMBERS:] or [half]
        within = dataclasses.replace(
            settings,
            k=",".join(map(str, self.numbers)),
            seeds=settings.seeds.split(",")[0],
            folds=_FOLDS,
            output=os.path.join(settings.output, "budgets"),
            keep_models=False,
        )
        self.plan = Plan(within, (), train, None)
        self.stopped_by: str | None = None

    def choose(self) -> dict[str, Choice]:
        """The choice of each method, by name; incomplete if `stopped_by` names a signal."""
        rate = self.rates[(len(self.rates) - 1) // 2]
        scores = self._measure(
            {m.name: [Budget(n, rate) for n in self.steps] for m in self.methods}
        )
        if self.stopped_by:
            return {}
        best = {name: _best(found).steps for name, found in scores.items()}
        more = {name: [Budget(steps, lr) for lr in self.rates] for name, steps in best.items()}
        for name, found in self._measure(more).items():
            scores[name] |= found
        return {name: Choice(_best(found), found) for name, found in scores.items()}

    def describe(self, choices: Mapping[str, Choice]) -> str:
        """A table in Markdown."""
        numbers = " and ".join(map(str, self.numbers))
        lines = [
            "",
            f"| Budget, by {_FOLDS} folds inside TRAIN with k = {numbers} | chosen | mean Dice"
            " in the folds |",
            "| --- | --- | --- |",
        ]
        for name, choice in choices.items():
            considered = "; ".join(f"{b}: {score:.3f}" for b, score in choice.scores.items())
            lines.append(f"| {name} | {choice.budget} | {considered} |")
        return "\n".join(lines) + "\n"

    def _measure(self, budgets: Mapping[str, Sequence[Budget]]) -> dict[str, dict[Budget, float]]:
        """Mean Dice over folds and numbers of images, of every budget of every method."""
        named = {
            f"{method.name}.{budget.steps}.{budget.lr:g}": (method, budget)
            for method in self.methods
            for budget in budgets[method.name]
        }
        methods = [
            dataclasses.replace(budget.applied(method), name=name)
            for name, (method, budget) in named.items()
        ]
        self.stopped_by = run_all(self.plan.with_methods(methods))
        results = read_results(self.plan.settings.output)
        scores: dict[str, dict[Budget, float]] = {method.name: {} for method in self.methods}
        for name, (method, budget) in named.items():
            found = [r for r in results if r["method"] == name and r["k"] in self.numbers]
            scores[method.name][budget] = spread([r["mean_dice"] for r in found]).mean
        return scores


def _best(scores: Mapping[Budget, float]) -> Budget:
    """The highest score; of equal ones, the fewest steps."""
    known = {b: -1.0 if math.isnan(score) else score for b, score in scores.items()}
    return max(known, key=lambda budget: (known[budget], -budget.steps))


def _rates(text: str) -> list[float]:
    try:
        rates = sorted({float(word) for word in comma_separated(text)})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise UserError(f"--tune_lr {text}: expected comma-separated numbers between 0 and 1")
    return rates
