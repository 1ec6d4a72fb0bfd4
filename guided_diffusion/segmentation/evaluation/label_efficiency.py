"""Methods compared by the number of labelled images: runs, the command of each, and tables.

A run is one method, trained on k images and evaluated on images that it never saw. The seed
determines which k images, and a draw of more images contains the draws of fewer.
"""

import contextlib
import functools
import io
import math
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch as th
from tqdm import tqdm

from guided_diffusion import dist_util, logger
from guided_diffusion.images.files import pair_files
from guided_diffusion.images.patients import shared_patients
from guided_diffusion.images.swaps import parse_swaps
from guided_diffusion.runtime import run_lock
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import check_output, save_json, writing
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.runtime.workers import Outcome, side_by_side
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
    RESULT_NAME,
    Figures,
    RunResult,
    read_result,
    read_results,
    results_by_folder,
    score_text,
    write_tables,
)
from guided_diffusion.segmentation.evaluation.mask_pairs import predict_mask_pairs
from guided_diffusion.segmentation.evaluation.methods import (
    RUNNERS,
    Method,
    comma_separated,
    parse_methods,
    parse_variants,
    split_flags,
)
from guided_diffusion.segmentation.evaluation.run_origin import (
    RunOrigin,
    check_neighbours,
    check_origin,
    digests_of_pairs,
    origin_of,
)
from guided_diffusion.segmentation.evaluation.scoring import evaluate
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.metrics import dice_iou
from guided_diffusion.segmentation.training.augment import check_flips
from guided_diffusion.segmentation.training.dataset import shows_foreground
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.job import find_table, join_names

# runs at a time that --jobs 0 chooses at most: each holds a network, its gradients and torch
_MOST_JOBS = 4


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


def label_efficiency(
    settings: LabelEfficiencyConfig,
    train: tuple[str, str],
    test: tuple[str | None, str | None],
    methods: Sequence[str] = (),
    variants: Sequence[str] = (),
) -> int:
    """The whole command.

    :param train: folders of radiographs and masks to draw from.
    :param test: folders to evaluate on; both None with --folds.
    :param methods: definitions of methods, see `parse_methods`.
    :param variants: definitions of variants, see `parse_variants`.
    :return: the exit code.
    """
    images, masks = test
    if (images is None) != (masks is None):
        raise UserError("TEST_IMG is given without TEST_MASK: give both folders or --folds")
    dist_util.setup_dist()
    check_output(settings.output, folder=True)
    run_lock.hold_folder(settings.output, "choose another --output")
    comparison = LabelEfficiency(
        settings,
        parse_methods(settings.methods, methods),
        train,
        (images, masks) if images is not None and masks is not None else None,
        parse_variants(variants),
    )
    if stopped_by := comparison.run_all():
        print(f"stopped by {stopped_by}: rerun the command to resume")
        return EXIT_STOPPED
    with open(os.path.join(settings.output, "table.md")) as file:
        print(file.read())
    return 0


class LabelEfficiency:
    """All runs of a comparison.

    :param train: folders of radiographs and masks to draw from.
    :param test: folders to evaluate on; None with `folds`.
    :param variants: further ways to evaluate every network, see `parse_variants`.
    """

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
        self._precision = run_precision.flags(settings.precision, settings.output)
        self.train = find_pairs(*train)
        self.numbers, self.seeds = _integers("k", settings.k, 1), _integers("seeds", settings.seeds)
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
            print(f"warning: scores on TEST will be too high: {shared}")
        most = len(self.train.names) - max(map(len, self.parts), default=0)
        if max(self.numbers) > most:
            raise UserError(f"--k {max(self.numbers)}: there are {most} images to draw from")
        self.runs = [
            Run(method, k, seed, fold)
            for seed in self.seeds
            for fold in (range(settings.folds) if settings.folds else [None])
            for k in self.numbers
            for method in methods
        ]

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
        held_out = [] if run.fold is None else self.parts[run.fold]
        return draw([n for n in self.train.names if n not in held_out], run.k, run.seed)

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
            *("--weights_save", self._model_path(run)),
            *self._precision,
            *split_flags("--common", settings.common),
            *run.method.flags,
        ]

    def commands(self, run: Run) -> list[str]:
        """The commands that repeat a run: training, evaluation, evaluation of each variant."""
        test, model = self.tests[run.fold or 0], self._model_path(run)
        train = [f"scripts/{run.method.script}", *self.training_arguments(run)]
        evaluate = ["scripts/evaluate.py", test.images, test.masks, "--model", model]
        evaluate += [*self._mask_flags(), *self._precision]
        lines = [train, evaluate, *([*evaluate, *flags] for flags in self.variants.values())]
        return [shlex.join(["python", *words]) for words in lines]

    def _mask_flags(self) -> list[str]:
        """How to read masks, as flags of both the training and the evaluation scripts."""
        settings = self.settings
        binary = ["--binary", "True"] if settings.binary else []
        ignore = ["--ignore_index", str(settings.ignore_index)]
        return binary + (ignore if settings.ignore_index >= 0 else [])

    def _model_path(self, run: Run) -> str:
        return os.path.join(self.settings.output, "runs", run.name, "segm.pth")

    def check_all(self) -> None:
        """:raises UserError: for a run with wrong flags, or that has finished with other flags."""
        for flags in self.variants.values():
            swaps = parse_flags(make_parser("", AveragingConfig), flags).get("flip_swap")
            check_swaps(self.categories, parse_swaps(swaps or ""), chosen=True)
        for run in self.runs:
            given = self._parse_arguments(run)
            check_flips(self.categories, given.get("flip", "none"), given.get("flip_swap", ""))
            found = read_result(self._folder(run))
            if found and "origin" in found:
                check_origin(self._folder(run), found["origin"], self._origin(run))
            elif found and found["commands"] != run_precision.without(self.commands(run)):
                raise UserError(
                    f"{self._folder(run)} was made with other flags ({found['commands'][0]}):"
                    " choose another --output or another name for the method"
                )
        self._check_neighbours()
        if self.parts:
            copy_folds(self.train, self.tests)
        self._check_foreground()

    def _check_neighbours(self) -> None:
        """:raises UserError: if earlier runs, of any method, saw other images of the same names."""
        found = results_by_folder(self.settings.output)
        there = {folder: result["origin"] for folder, result in found.items() if "origin" in result}
        check_neighbours(there, {"train": self._train_digests, "test": self._test_digests})
        if unknown := found.keys() - there.keys():
            print(f"{', '.join(unknown)}: by an older version, which did not record their data")

    @functools.cached_property
    def _train_digests(self) -> dict[str, str]:
        return digests_of_pairs(self.train.images, self.train.masks)

    @functools.cached_property
    def _test_digests(self) -> dict[str, str]:
        return {} if self.parts else digests_of_pairs(self.tests[0].images, self.tests[0].masks)

    def _origin(self, run: Run) -> RunOrigin:
        train = {name: self._train_digests[name] for name in self.images_of(run)}
        fold = [] if run.fold is None else self.parts[run.fold]
        test = {name: self._train_digests[name] for name in fold} or self._test_digests
        variants = {name: list(flags) for name, flags in self.variants.items()}
        more = {"script": run.method.script, "common": self.settings.common, "variants": variants}
        return origin_of(self._parse_arguments(run), train, test, **more)

    def _check_foreground(self) -> None:
        """:raises UserError: if a run would train or be evaluated on background alone."""
        rule = self.categories.mask_rule(self.settings.binary)

        def with_foreground(pairs: Pairs) -> set[str]:
            files = pair_files(pairs.images, pairs.masks)
            masks = ((name, rule.read(path)) for name, _, path in files)
            return {name for name, mask in masks if shows_foreground(mask)}

        useful = with_foreground(self.train)
        for run in self.runs:
            names = self.images_of(run)
            if useful.isdisjoint(names):
                raise UserError(
                    f"{run.name} would train on {', '.join(names)}, whose masks show no class but"
                    " the background: choose other --seeds or a larger --k"
                )
        for test in self.tests:
            if not with_foreground(test):
                raise UserError(
                    f"{test.masks}: no mask shows a class but the background, so nothing can be"
                    " measured: add images with foreground, or choose fewer --folds"
                )

    def _folder(self, run: Run) -> str:
        return os.path.dirname(self._model_path(run))

    def _parse_arguments(self, run: Run) -> dict[str, Any]:
        make_flags, _ = RUNNERS[run.method.script]
        try:
            return parse_flags(make_flags(), self.training_arguments(run))
        except UserError as error:
            raise UserError(f"method {run.method.name}: {error}") from error

    def run_all(self) -> str | None:
        """Do the runs that are not finished; returns the signal that stopped them, if any."""
        self.check_all()
        todo = [run for run in self.runs if read_result(self._folder(run)) is None]
        with progress_bar(len(self.runs), unit="run", initial=len(self.runs) - len(todo)) as bar:

            def report(run: Run, outcome: Outcome) -> None:
                if not outcome.stopped_by:
                    tqdm.write(outcome.message)
                    bar.update()
                    self.write_tables(picture=False)

            jobs = min(len(todo), self.settings.jobs or _parallel_runs())
            if jobs > 1:
                tqdm.write(f"{jobs} runs at a time")
                begin = functools.partial(_share_cores, jobs)
                stopped_by = side_by_side(self.work, todo, jobs, begin, report)
            else:
                stopped_by = self._one_by_one(todo, bar, report)
        self.write_tables()
        return stopped_by

    def _one_by_one(
        self, todo: Sequence[Run], bar: tqdm, report: Callable[[Run, Outcome], None]
    ) -> str | None:
        for run in todo:
            bar.set_description(run.name)
            outcome = self.work(run)
            report(run, outcome)
            if outcome.stopped_by:
                return outcome.stopped_by
        return None

    def work(self, run: Run) -> Outcome:
        """Train and evaluate."""
        began = time.monotonic()
        _, module = RUNNERS[run.method.script]
        prepare = import_module(module).prepare
        with writing(self._folder(run)):
            os.makedirs(self._folder(run), exist_ok=True)
        # its messages are in its log.txt
        with contextlib.redirect_stdout(io.StringIO()), run_lock.released():
            finetuner = prepare(self._parse_arguments(run))
            if finetuner is not None:
                finetuner.run()
            logger.reset()
        if finetuner is not None and finetuner.stopped_by:
            return Outcome(finetuner.stopped_by)
        path, commands = self._model_path(run), self.commands(run)
        test = self.tests[run.fold or 0]
        result: RunResult = {
            "method": run.method.name,
            "k": run.k,
            "seed": run.seed,
            "fold": run.fold,
            **self._evaluate(path, test, ()),
            "variants": {},
            "seconds": round(time.monotonic() - began, 1),
            "images": self.images_of(run),
            "commands": commands,
            "origin": self._origin(run),
        }
        if self._precision:
            result["precision"] = self._precision[1]
        messages = []
        for (name, flags), command in zip(self.variants.items(), commands[2:]):
            try:
                figures = self._evaluate(path, test, flags)
                result["variants"][name] = {**figures, "command": command}
            except UserError as error:  # not every kind of network has every option
                messages.append(f"{run.name} without {name}: {error}")
        save_json(os.path.join(self._folder(run), RESULT_NAME), result)
        os.remove(finetuner.last_path if finetuner else path.replace(".pth", "_last.pth"))
        if not self.settings.keep_models:
            os.remove(path)
        dice = score_text(result["mean_dice"])
        messages.append(f"{run.name}: mean Dice {dice}, {result['seconds']:.0f} s")
        if th.cuda.is_available():
            th.cuda.empty_cache()
        return Outcome(message="\n".join(messages))

    def _evaluate(self, path: str, test: Pairs, flags: Sequence[str]) -> Figures:
        """Scores of a model over all test images, each at its own size.

        :param flags: of evaluate.py.
        """
        averaging = parse_flags(make_parser("", AveragingConfig), [*self._precision, *flags])
        predictor = from_flags(AveragingConfig, averaging).load(path, dist_util.dev())
        binary = self.settings.binary
        rule = self.categories.mask_rule(binary)
        pairs = predict_mask_pairs(predictor, test.images, test.masks, rule)
        scores = dice_iou(evaluate(pairs, self.categories, binary).confusion)
        names = [category.name for category in self.categories]
        return {
            "mean_dice": _plain(scores.mean_dice()),
            "mean_iou": _plain(scores.mean_iou()),
            "dice": dict(zip(names, map(_plain, scores.dice))),
            "iou": dict(zip(names, map(_plain, scores.iou))),
        }

    def write_tables(self, picture: bool = True) -> None:
        """Write the tables of all runs in the output folder, with those of this command first."""
        results = read_results(self.settings.output)
        order = [
            method.name + suffix
            for method in self.methods
            for suffix in ("", *(f"+{name}" for name in self.variants))
        ]
        names = [category.name for category in self.categories]
        write_tables(self.settings.output, results, order, names, picture)


def _parallel_runs() -> int:
    """How many runs at a time suit this machine: on a GPU one, which has it for itself."""
    return 1 if dist_util.dev().type == "cuda" else min(_MOST_JOBS, dist_util.cores())


def _share_cores(jobs: int) -> None:
    """Leave the other processes their cores."""
    th.set_num_threads(max(1, min(th.get_num_threads(), dist_util.cores() // jobs)))


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _integers(name: str, text: str, lowest: int = 0) -> list[int]:
    words = comma_separated(text)
    if not words or not all(word.isdigit() and int(word) >= lowest for word in words):
        raise UserError(f"--{name} {text}: expected comma-separated integers, at least {lowest}")
    return list(dict.fromkeys(int(word) for word in words))
