"""The runs of a comparison by the number of labelled images: which, on what, with which flags.

A run is one method, trained on k images and evaluated on images that it never saw, or the union of
several, which needs their networks and no training. The seed determines which k images, unless they
are selected, and a draw of more images contains the draws of fewer.
"""

import copy
import dataclasses
import functools
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.patients import shared_patients
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.images.swaps import parse_swaps
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say, warn
from guided_diffusion.segmentation.categories import check_swaps
from guided_diffusion.segmentation.evaluation import run_precision
from guided_diffusion.segmentation.evaluation.config import LabelEfficiencyConfig
from guided_diffusion.segmentation.evaluation.draws import (
    Pairs,
    copy_folds,
    draw,
    find_films,
    find_pairs,
    fold_folders,
    split_patients,
)
from guided_diffusion.segmentation.evaluation.efficiency_tables import (
    RunResult,
    read_result,
    results_by_folder,
)
from guided_diffusion.segmentation.evaluation.methods import (
    RUNNERS,
    Method,
    comma_separated,
    split_flags,
)
from guided_diffusion.segmentation.evaluation.run_origin import (
    RunOrigin,
    check_neighbours,
    check_origin,
    digests_of_pairs,
    origin_of,
    union_of,
)
from guided_diffusion.segmentation.evaluation.selected import Selector
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.training.augment import check_flips
from guided_diffusion.segmentation.training.dataset import shows_foreground
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.job import find_table, join_names


@dataclass(frozen=True)
class Run:
    """One method, k images, one seed; fold is None if TEST is evaluated."""

    method: Method
    k: int
    seed: int
    fold: int | None = None

    @property
    def name(self) -> str:
        fold = "" if self.fold is None else f"_fold{self.fold}"
        return f"{self.method.name}_k{self.k}_seed{self.seed}{fold}"

    def __str__(self) -> str:
        return self.name


class Plan:
    """The runs of a comparison: their images, arguments, files and origins.

    :param train: folders of radiographs and masks to draw from.
    :param test: folders to evaluate on; None with `folds`.
    :param variants: further ways to evaluate every network, see `parse_variants`.
    """

    NUMBER = "--k"  # the flag for the number of images

    def __init__(
        self,
        settings: LabelEfficiencyConfig,
        methods: Sequence[Method],
        train: tuple[str, str],
        test: tuple[str, str] | None,
        variants: Mapping[str, tuple[str, ...]] | None = None,
    ):
        self.settings = settings
        self.methods = methods
        self.variants = dict(variants or {})
        self.precision = run_precision.flags(settings.precision, settings.output)
        self.train = find_pairs(*train)
        self.numbers = positive_integers("k", settings.k)
        self.seeds = _integers("seeds", settings.seeds)
        self._check(test)
        self.categories = find_table(
            Folders(train, test),
            settings.out_channels,
            settings.categories,
            settings.binary,
            settings.ignore_index,
        )
        self.parts = split_patients(self.train, settings.folds) if settings.folds else []
        self.tests = [find_pairs(*test)] if test else fold_folders(self.parts, settings.output)
        if test and (shared := shared_patients(find_films(self.train), find_films(self.tests[0]))):
            warn(f"scores on TEST will be too high: {shared}")
        most = len(self.train.names) - max(map(len, self.parts), default=0)
        if max(self.numbers) > most:
            raise UserError(f"--k {max(self.numbers)}: there are {most} images to draw from")
        self.selected = self._select() if settings.choose == "select" else {}
        self.runs = self._runs()

    def with_methods(self, methods: Sequence[Method]) -> "Plan":
        """The plan for other methods, on the same images."""
        plan = copy.copy(self)
        plan.methods = methods
        plan.runs = plan._runs()
        return plan

    def _runs(self) -> list[Run]:
        folds = range(self.settings.folds) if self.settings.folds else [None]
        return [
            Run(method, k, seed, fold)
            for seed in self.seeds
            for fold in folds
            for k in self.numbers
            for method in self.methods
        ]

    @property
    def ready(self) -> list[Run]:
        """The runs whose images are known before any run is made."""
        return self.runs

    def needed(self) -> set[Run]:
        """The runs whose networks others that have not finished will use."""
        unfinished = [run for run in self.runs if run.method.members and not self.finished(run)]
        return {member for union in unfinished for member in self.members(union)}

    def members(self, union: Run) -> list[Run]:
        """The runs whose networks a union consists of."""
        methods = {method.name: method for method in self.methods}
        return [dataclasses.replace(union, method=methods[name]) for name in union.method.members]

    def _check(self, test: tuple[str, str] | None) -> None:
        settings = self.settings
        if bool(settings.folds) == bool(test):
            raise UserError("give either TEST_IMG and TEST_MASK or --folds, which divides TRAIN")
        if test and os.path.realpath(test[0]) == os.path.realpath(self.train.images):
            raise UserError(f"{test[0]} would be trained and tested on: divide TRAIN with --folds")
        if settings.folds and not 2 <= settings.folds <= len(self.train.names):
            raise UserError(f"--folds {settings.folds}: from 2 to the number of training images")
        if not settings.checkpoint:
            raise UserError("--checkpoint is missing: name the pretrained network")

    def images_of(self, run: Run) -> list[str]:
        """Names of the images that a run trains on."""
        if self.selected:
            return self.selected[run.fold, run.k]
        held_out = [] if run.fold is None else self.parts[run.fold]
        return draw([n for n in self.train.names if n not in held_out], run.k, run.seed)

    def _select(self) -> dict[tuple[int | None, int], list[str]]:
        """Names of the images to label, by fold and number: the same for all seeds."""
        selector = Selector(self.train, self.settings.checkpoint)
        parts: dict[int | None, list[str]] = {None: []}
        if self.parts:
            parts = dict(enumerate(self.parts))
        return {
            (fold, k): selector.choose(k, held_out)
            for fold, held_out in parts.items()
            for k in self.numbers
        }

    def training_arguments(self, run: Run) -> list[str]:
        """The command-line arguments of the run's script."""
        settings = self.settings
        source = [settings.checkpoint]
        if run.method.script != "finetune.py":
            source = ["--checkpoint", settings.checkpoint]
        return [
            *source,
            self.train.images,
            self.train.masks,
            *("--train_names", join_names(self.images_of(run))),
            *("--seed", str(run.seed)),
            *("--steps", str(settings.steps)),
            *("--batch_size", str(settings.batch_size)),
            *("--out_channels", str(len(self.categories))),
            *self._mask_flags(),
            *(("--categories", settings.categories) if settings.categories else ()),
            *("--weights_save", self.model_path(run)),
            *self.precision,
            *split_flags("--common", settings.common),
            *run.method.flags,
        ]

    def commands(self, run: Run) -> list[str]:
        """The commands that repeat a run: training, evaluation, evaluation of each variant."""
        test, model = self.tests[run.fold or 0], self.model_path(run)
        evaluate = ["scripts/evaluate.py", test.images, test.masks, "--model", model]
        evaluate += [*self._mask_flags(), *self.precision]
        lines = [evaluate, *([*evaluate, *flags] for flags in self.variants.values())]
        if run.method.members:
            names = " and ".join(member.name for member in self.members(run))
            train = f"# {run.name}: {names} in one file, as finetune.py --partner joins networks"
        else:
            train = _python([f"scripts/{run.method.script}", *self.training_arguments(run)])
        return [train, *map(_python, lines)]

    def _mask_flags(self) -> list[str]:
        """How to read masks, as flags of both the training and the evaluation scripts."""
        settings = self.settings
        binary = ["--binary", "True"] if settings.binary else []
        ignore = ["--ignore_index", str(settings.ignore_index)]
        return binary + (ignore if settings.ignore_index >= 0 else [])

    def model_path(self, run: Run) -> str:
        """Of the network of a run."""
        return os.path.join(self.folder(run), "segm.pth")

    def check_flags(self) -> None:
        """:raises UserError: for wrong flags of a run."""
        for flags in self.variants.values():
            swaps = parse_flags(make_parser("", AveragingConfig), flags).get("flip_swap")
            check_swaps(self.categories, parse_swaps(swaps or ""), chosen=True)
        for run in self.ready:
            if run.method.members:
                self._check_union(run)
                continue
            given = self.parse_arguments(run)
            check_flips(self.categories, given.get("flip", "none"), given.get("flip_swap", ""))

    def _check_union(self, union: Run) -> None:
        """:raises UserError: if its networks would not all see the same images."""
        given = [self.parse_arguments(member) for member in self.members(union)]
        for field in dataclasses.fields(ReadingConfig):
            if len({flags.get(field.name) for flags in given}) > 1:
                raise UserError(
                    f"--method {union.method.name}: its networks predict as one, from the same"
                    f" images: give --{field.name} to all of its methods, or to none"
                )

    def check_all(self) -> None:
        """:raises UserError: for wrong flags, runs finished with other flags or data, and images
        without foreground.
        """
        self.check_flags()
        for run in self.runs:
            found = self.result(run)
            if found and "origin" in found:
                check_origin(self.folder(run), found["origin"], self.origin(run))
            elif found and found["commands"] != run_precision.without(self.commands(run)):
                raise UserError(
                    f"{self.folder(run)} was made with other flags ({found['commands'][0]}):"
                    " choose another --output or another name for the method"
                )
        self._check_neighbours()
        if self.parts:
            copy_folds(self.train, self.tests)
        self.check_foreground()

    def _check_neighbours(self) -> None:
        """:raises UserError: if earlier runs, of any method, saw other images of the same names."""
        found = results_by_folder(self.settings.output)
        there = {folder: result["origin"] for folder, result in found.items() if "origin" in result}
        check_neighbours(there, {"train": self._train_digests, "test": self._test_digests})
        if unknown := found.keys() - there.keys():
            say(f"{', '.join(unknown)}: by an older version, which did not record their data")

    @functools.cached_property
    def _train_digests(self) -> dict[str, str]:
        return digests_of_pairs(self.train.images, self.train.masks)

    @functools.cached_property
    def _test_digests(self) -> dict[str, str]:
        return {} if self.parts else digests_of_pairs(self.tests[0].images, self.tests[0].masks)

    def origin(self, run: Run) -> RunOrigin:
        variants = {name: list(flags) for name, flags in self.variants.items()}
        if run.method.members:
            return union_of({m.method.name: self.origin(m) for m in self.members(run)}, variants)
        train = {name: self._train_digests[name] for name in self.images_of(run)}
        fold = [] if run.fold is None else self.parts[run.fold]
        test = {name: self._train_digests[name] for name in fold} or self._test_digests
        more = {"script": run.method.script, "common": self.settings.common, "variants": variants}
        return origin_of(self.parse_arguments(run), train, test, **more)

    def check_foreground(self) -> None:
        """:raises UserError: if a run would train or be evaluated on background alone."""
        rule = self.categories.mask_rule(self.settings.binary)

        def with_foreground(pairs: Pairs) -> set[str]:
            files = pair_files(pairs.images, pairs.masks)
            masks = ((name, rule.read(path)) for name, _, path in files)
            return {name for name, mask in masks if shows_foreground(mask)}

        useful = with_foreground(self.train)
        for run in self.ready:
            names = self.images_of(run)
            if useful.isdisjoint(names):
                raise UserError(
                    f"{run.name} would train on {', '.join(names)}, whose masks show no class but"
                    f" the background: choose other --seeds or a larger {self.NUMBER}"
                )
        for test in self.tests:
            if not with_foreground(test):
                raise UserError(
                    f"{test.masks}: no mask shows a class but the background, so nothing can be"
                    " measured: add images with foreground, or choose fewer --folds"
                )

    def remarks(self, results: Sequence[RunResult]) -> str:
        """What table.md says below its tables, in Markdown.

        :param results: of the finished runs.
        """
        return ""

    def folder(self, run: Run) -> str:
        return os.path.join(self.settings.output, "runs", run.name)

    def result(self, run: Run) -> RunResult | None:
        """What a run left; None if it has not finished."""
        return read_result(self.folder(run))

    def finished(self, run: Run) -> bool:
        return self.result(run) is not None

    def parse_arguments(self, run: Run) -> dict[str, Any]:
        make_flags, _ = RUNNERS[run.method.script]
        try:
            return parse_flags(make_flags(), self.training_arguments(run))
        except UserError as error:
            raise UserError(f"method {run.method.name}: {error}") from error


def _python(words: Sequence[str]) -> str:
    return shlex.join(["python", *words])


def positive_integers(name: str, text: str) -> list[int]:
    """`"1,2,5"` to numbers, each once.

    :param name: of the flag, for messages.
    """
    return _integers(name, text, 1)


def _integers(name: str, text: str, lowest: int = 0) -> list[int]:
    words = comma_separated(text)
    if not words or not all(word.isdigit() and int(word) >= lowest for word in words):
        raise UserError(f"--{name} {text}: expected comma-separated integers, at least {lowest}")
    return list(dict.fromkeys(int(word) for word in words))
