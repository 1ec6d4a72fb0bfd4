"""The runs of a simulated loop: each learns from the images of the one before, and from more."""

import dataclasses
import os
from collections.abc import Sequence

from guided_diffusion.images.patients import find_patients
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.files import read_json
from guided_diffusion.segmentation.evaluation.config import LabelEfficiencyConfig, LoopConfig
from guided_diffusion.segmentation.evaluation.draws import draw, find_films, find_pairs
from guided_diffusion.segmentation.evaluation.efficiency_plan import Plan, Run
from guided_diffusion.segmentation.evaluation.efficiency_tables import RunResult
from guided_diffusion.segmentation.evaluation.loop_tables import LoopTable
from guided_diffusion.segmentation.evaluation.methods import Method, comma_separated, parse_methods

NEXT, UNCERTAIN, RANDOM = "next", "uncertain", "random"
RULES = (NEXT, UNCERTAIN, RANDOM)
_CHOICE = "chosen.json"


class LoopPlan(Plan):
    """A rule of choosing is the method of its runs; k grows from round to round.

    All rules of a seed begin with the same drawn images, and so with the same network, which the
    first of them trains.

    :param train: folders of the radiographs to choose among and of their masks.
    :param val: folders to evaluate on.
    """

    NUMBER = "--start"

    def __init__(self, config: LoopConfig, train: tuple[str, str], val: tuple[str, str]):
        numbers = [config.start + config.add * number for number in range(config.rounds + 1)]
        self.films = find_films(find_pairs(*train))
        names, paths = zip(*self.films)
        patients = find_patients(names, paths)
        say(patients.said)
        self.patients = dict(zip(paths, patients.groups))
        self._patient_of = dict(zip(names, patients.groups))
        if numbers[-1] > (count := len(set(patients.groups))):
            raise UserError(
                f"--start {config.start} and --rounds {config.rounds} of --add {config.add} make"
                f" {numbers[-1]} images; {train[0]} has {count} patients, and one image of each is"
                " labelled: lower them"
            )
        settings = {**vars(config), "k": ",".join(map(str, numbers)), "choose": "draw", "folds": 0}
        methods = _methods(config)
        super().__init__(from_mapping(LabelEfficiencyConfig, settings), methods, train, val)

    def _runs(self) -> list[Run]:
        """In an order in which each run comes after the one that it waits for."""
        return [
            Run(method, k, seed)
            for k in self.numbers
            for seed in self.seeds
            for method in self.methods
        ]

    @property
    def ready(self) -> list[Run]:
        return [run for run in self.runs if self.previous(run) is None or self.is_chosen(run)]

    def needed(self) -> set[Run]:
        waiting = [run for run in self.runs if not (self.finished(run) or self.is_chosen(run))]
        return {previous for run in waiting if (previous := self.previous(run))}

    def start(self, run: Run) -> Run:
        """The run that trains the first network of its seed."""
        return dataclasses.replace(run, method=self.methods[0], k=self.numbers[0])

    def repeats_start(self, run: Run) -> bool:
        """Whether it would train the same network as another rule has."""
        return run.k == self.numbers[0] and run != self.start(run)

    def previous(self, run: Run) -> Run | None:
        """The run by whose network its new images are chosen; None if they are drawn."""
        place = self.numbers.index(run.k)
        if not place or run.method.name == RANDOM:
            return None
        if place == 1:
            return self.start(run)
        return dataclasses.replace(run, k=self.numbers[place - 1])

    def table(self, results: Sequence[RunResult]) -> LoopTable:
        """The rules side by side."""
        rules = [method.name for method in self.methods]
        return LoopTable(results, rules, self.numbers, self.seeds)

    def remarks(self, results: Sequence[RunResult]) -> str:
        return self.table(results).markdown()

    def choice_path(self, run: Run) -> str:
        """Of the file that names the images that a run adds."""
        return os.path.join(self.folder(run), _CHOICE)

    def is_chosen(self, run: Run) -> bool:
        return os.path.exists(self.choice_path(run))

    def images_of(self, run: Run) -> list[str]:
        previous = self.previous(run)
        if previous is None:
            return self._drawn(run.seed)[: run.k]
        return [*self.images_of(previous), *read_json(self.choice_path(run))["images"]]

    def _drawn(self, seed: int) -> list[str]:
        """The images in drawn order, of every patient the first."""
        first: dict[int, str] = {}
        for name in draw(self.train.names, len(self.train.names), seed):
            first.setdefault(self._patient_of[name], name)
        return [*first.values()]


def _methods(config: LoopConfig) -> list[Method]:
    """The rules, each with the script and flags of the one method."""
    rules = list(dict.fromkeys(comma_separated(config.choose)))
    if not rules or set(rules) - set(RULES):
        raise UserError(f"--choose {config.choose}: name some of {', '.join(RULES)}")
    found = parse_methods(config.method)
    if len(found) != 1:
        raise UserError(
            f"--method {config.method}: name one that trains a single network; for two that learn"
            " side by side, --common '--partner imagenet'"
        )
    return [dataclasses.replace(found[0], name=rule) for rule in rules]
