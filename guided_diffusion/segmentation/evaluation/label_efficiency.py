"""Methods compared by the number of labelled images: runs, each with its command, and their table.

A run is one method trained on k images and evaluated on images that it never saw. Which k images is
a function of the seed, and a draw of more images contains the draws of fewer.
"""

import contextlib
import io
import math
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import blobfile as bf
import numpy as np
import torch as th
from tqdm import tqdm

from guided_diffusion import dist_util, logger
from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_mask
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import read_json, save_json
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.segmentation.categories import (
    BINARY,
    Category,
    categories_for,
    load_categories,
)
from guided_diffusion.segmentation.evaluation.efficiency_tables import write_tables
from guided_diffusion.segmentation.inference.job import AveragingConfig
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.training.dataset import count_classes

# the script that a method runs, and the function that does the same in this process
RUNNERS = {
    "finetune.py": "guided_diffusion.segmentation.training.finetune",
    "baseline_train.py": "guided_diffusion.segmentation.training.baselines",
    "mask_diffusion_train.py": "guided_diffusion.segmentation.training.mask_training",
}
# a script and its flags; whoever gives no script means finetune.py. The baselines learn at Adam's
# own default rate, whatever the recipe's is
METHODS = {
    "recipe": "",
    "plain": "--loss ce --schedule constant --warmup 0 --lr 1e-3 --weight_decay 0 --ema_rate 0"
    " --layer_decay 1 --head_lr_scale 1 --timestep 1 --noise_at_timestep False"
    " --augmentation light",
    "scratch": "--random_init True",
    "smp": "baseline_train.py --network smp --encoder resnet34 --encoder_weights none --lr 1e-3",
    "features": "baseline_train.py --network features --lr 1e-3",
    "mask_diffusion": "mask_diffusion_train.py --lr 1e-3 --ema_rate 0.99 --sample_interval 0",
}
_RESULT = "result.json"


@dataclass(frozen=True)
class LabelEfficiencyConfig:
    """What to compare."""

    TITLE = "Comparison"

    checkpoint: str = flag("", "pretrained network: model*.pt or ema_*.pt")
    k: str = flag("1,2,5,10", "numbers of labelled images, by commas")
    seeds: str = flag("0,1,2", "of the draw of the images and of the training, by commas")
    methods: str = flag("recipe,plain,scratch,smp,features", "by commas, built in or of --method")
    steps: int = flag(400, "optimisation steps of each run")
    batch_size: int = flag(2, "images a step", "-b")
    common: str = flag("", "further flags of every method, in quotes")
    categories: str = flag("", "class table, JSON; '': flags/categories.json where it fits")
    out_channels: int = flag(0, "classes, background counted; 0: as categories or masks have")
    binary: bool = flag(False, "two classes: any value but 0 in a mask is the second")
    folds: int = flag(
        0, "evaluate on parts of TRAIN, this many in turn, and train on the rest; 0: on TEST"
    )
    output: str = flag("label_efficiency", "folder of runs, tables and picture", "-o")
    keep_models: bool = flag(False, "keep the network of every run")


@dataclass(frozen=True)
class Method:
    """A script under `scripts/` and the flags that it is given."""

    name: str
    script: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Folders of radiographs and of masks, and the names of those that count."""

    images: str
    masks: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One method, k images, one seed; fold is None where TEST is evaluated."""

    method: Method
    k: int
    seed: int
    fold: int | None = None

    @property
    def name(self) -> str:
        fold = "" if self.fold is None else f"_fold{self.fold}"
        return f"{self.method.name}_k{self.k}_seed{self.seed}{fold}"


def parse_methods(text: str, more: Sequence[str] = ()) -> list[Method]:
    """The methods that `text` names.

    :param more: definitions like "NAME: FLAGS" or "NAME: SCRIPT FLAGS".
    """
    known = dict(METHODS)
    for definition in more:
        name, flags = _definition("--method", definition)
        known[name] = flags
    methods = []
    for name in _words(text):
        if name not in known:
            raise UserError(f"--methods {name}: choose from {', '.join(known)}, or add a --method")
        words = shlex.split(known[name])
        script = "finetune.py"
        if words and words[0].endswith(".py"):
            script = words.pop(0)
        if script not in RUNNERS:
            raise UserError(f"--method {name}: {script} is none of {', '.join(RUNNERS)}")
        methods.append(Method(name, script, tuple(words)))
    return methods


def parse_variants(definitions: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Flags of evaluate.py by name, from definitions like "NAME: FLAGS"."""
    found = {}
    for definition in definitions:
        name, flags = _definition("--variant", definition)
        found[name] = tuple(shlex.split(flags))
        from_flags(AveragingConfig, parse_flags(make_parser("", AveragingConfig), found[name]))
    return found


def _definition(flag_name: str, text: str) -> tuple[str, str]:
    name, colon, flags = text.partition(":")
    if not colon or not re.fullmatch(r"[\w.+-]+", name.strip()):
        raise UserError(f"{flag_name} {text!r}: expected 'NAME: FLAGS', without / or spaces")
    return name.strip(), flags


def draw(names: Sequence[str], k: int, seed: int) -> list[str]:
    """k of the names; the draw of fewer with the same seed is its beginning."""
    generator = np.random.default_rng(rng.derive_seed(seed, "labelled images"))
    return [names[i] for i in generator.permutation(len(names))[:k]]


def split_folds(names: Sequence[str], folds: int) -> list[list[str]]:
    """The names in `folds` parts that differ in size by one at most."""
    order = np.random.default_rng(rng.derive_seed(0, "folds")).permutation(len(names))
    return [sorted(names[i] for i in order[fold::folds]) for fold in range(folds)]


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
        self.train = _pairs(*train)
        self.numbers, self.seeds = _integers("k", settings.k, 1), _integers("seeds", settings.seeds)
        self._check(test)
        self.categories = self._categories([train, *([test] if test else [])])
        self.parts = split_folds(self.train.names, settings.folds) if settings.folds else []
        self.tests = [_pairs(*test)] if test else self._copy_folds()
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
            raise UserError("give either TEST_IMG and TEST_MASK or --folds, which takes from TRAIN")
        if test and os.path.realpath(test[0]) == os.path.realpath(self.train.images):
            raise UserError(f"{test[0]} is to train and to test on: divide TRAIN with --folds")
        if settings.folds and not 2 <= settings.folds <= len(self.train.names):
            raise UserError(f"--folds {settings.folds}: from 2 to the number of training images")
        if settings.steps < 1:
            raise UserError(f"--steps {settings.steps}: must be at least 1")
        if not settings.checkpoint:
            raise UserError("--checkpoint is missing: name the pretrained network")

    def _categories(self, folders: Sequence[tuple[str, str]]) -> tuple[Category, ...]:
        settings = self.settings
        if settings.binary:
            return categories_for(2, settings.categories) if settings.categories else BINARY
        if settings.out_channels:
            return categories_for(settings.out_channels, settings.categories or None)
        if settings.categories:
            return load_categories(settings.categories)
        return categories_for(count_classes(folders))

    def _copy_folds(self) -> list[Pairs]:
        """The images of each fold in folders of their own, so that commands can name them."""
        folds = []
        files = pair_files(self.train.images, self.train.masks)
        for number, names in enumerate(self.parts):
            folder = os.path.join(self.settings.output, "folds", str(number))
            for name, *paths in files:
                for kind, path in zip(("IMG", "MASK"), paths):
                    target = os.path.join(folder, kind, name + os.path.splitext(path)[1])
                    if name in names and not os.path.exists(target):
                        os.makedirs(os.path.dirname(target), exist_ok=True)
                        bf.copy(path, target)
            folds.append(_pairs(os.path.join(folder, "IMG"), os.path.join(folder, "MASK")))
        return folds

    def images_of(self, run: Run) -> list[str]:
        """Names of the images that a run trains on."""
        kept_out = set() if run.fold is None else set(self.parts[run.fold])
        return draw([n for n in self.train.names if n not in kept_out], run.k, run.seed)

    def training_words(self, run: Run) -> list[str]:
        """The arguments of the run's script."""
        settings = self.settings
        source = [settings.checkpoint]
        if run.method.script != "finetune.py":
            source = ["--checkpoint", settings.checkpoint]
        return [
            *source,
            self.train.images,
            self.train.masks,
            *("--train_names", ",".join(self.images_of(run))),
            *("--seed", str(run.seed)),
            *("--steps", str(settings.steps)),
            *("--batch_size", str(settings.batch_size)),
            *("--out_channels", str(len(self.categories))),
            *(("--binary", "True") if settings.binary else ()),
            *(("--categories", settings.categories) if settings.categories else ()),
            *("--weights_save", self._model_path(run)),
            *shlex.split(settings.common),
            *run.method.flags,
        ]

    def commands(self, run: Run) -> list[str]:
        """The commands that repeat a run: training, evaluation, evaluation of each variant."""
        test, model = self.tests[run.fold or 0], self._model_path(run)
        train = [f"scripts/{run.method.script}", *self.training_words(run)]
        evaluate = ["scripts/evaluate.py", test.images, test.masks, "--model", model]
        evaluate += ["--binary", "True"] if self.settings.binary else []
        lines = [train, evaluate, *([*evaluate, *flags] for flags in self.variants.values())]
        return [shlex.join(["python", *words]) for words in lines]

    def _model_path(self, run: Run) -> str:
        return os.path.join(self.settings.output, "runs", run.name, "segm.pth")

    def check_all(self) -> None:
        """:raises UserError: for a run whose flags are wrong, or that was done with other flags."""
        for run in self.runs:
            self._given(run)
            found = read_result(self._folder(run))
            if found and found["commands"] != self.commands(run):
                raise UserError(
                    f"{self._folder(run)} was done with other flags ({found['commands'][0]}):"
                    " choose another --output or another name for the method"
                )

    def _folder(self, run: Run) -> str:
        return os.path.dirname(self._model_path(run))

    def _given(self, run: Run) -> dict[str, Any]:
        module = import_module(RUNNERS[run.method.script])
        try:
            return parse_flags(module.make_flags(), self.training_words(run))
        except UserError as error:
            raise UserError(f"method {run.method.name}: {error}") from error

    def run_all(self) -> str | None:
        """Do what is not done; the name of the signal that stopped it, or None at the end."""
        self.check_all()
        todo = [run for run in self.runs if read_result(self._folder(run)) is None]
        with tqdm(todo, unit="run", dynamic_ncols=True, initial=len(self.runs) - len(todo)) as bar:
            bar.total = len(self.runs)
            for run in bar:
                bar.set_description(run.name)
                stopped_by = self._run(run)
                if stopped_by:
                    self.write_tables()
                    return stopped_by
                self.write_tables(picture=False)
        self.write_tables()
        return None

    def _run(self, run: Run) -> str | None:
        began = time.monotonic()
        prepare = import_module(RUNNERS[run.method.script]).prepare
        os.makedirs(self._folder(run), exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):  # its messages are in its log.txt
            finetuner = prepare(self._given(run))
            if finetuner is not None:
                finetuner.run()
                stopped_by = finetuner.stopped_by
            logger.reset()
        if finetuner is not None and stopped_by:
            return stopped_by
        path = self._model_path(run)
        test = self.tests[run.fold or 0]
        result = {
            "method": run.method.name,
            "k": run.k,
            "seed": run.seed,
            "fold": run.fold,
            **self._evaluate(path, test, ()),
            "variants": {},
            "seconds": round(time.monotonic() - began, 1),
            "images": self.images_of(run),
            "commands": self.commands(run),
        }
        for (name, flags), line in zip(self.variants.items(), result["commands"][2:]):
            try:
                scores = self._evaluate(path, test, flags)
                result["variants"][name] = {**scores, "command": line}
            except UserError as error:  # not every kind of network knows every flag
                tqdm.write(f"{run.name} without {name}: {error}")
        save_json(os.path.join(self._folder(run), _RESULT), result)
        os.remove(finetuner.last_path if finetuner else path.replace(".pth", "_last.pth"))
        if not self.settings.keep_models:
            os.remove(path)
        tqdm.write(f"{run.name}: mean Dice {result['mean_dice']:.4f}, {result['seconds']:.0f} s")
        if th.cuda.is_available():
            th.cuda.empty_cache()
        return None

    def _evaluate(self, path: str, test: Pairs, flags: Sequence[str]) -> dict[str, Any]:
        """Scores of a model over all test images, each at its own size.

        :param flags: of evaluate.py.
        """
        averaging = parse_flags(make_parser("", AveragingConfig), flags)
        predictor = from_flags(AveragingConfig, averaging).load(path, dist_util.dev())
        classes = len(self.categories)
        confusion = np.zeros((classes, classes), np.int64)
        for _, image_path, mask_path in pair_files(test.images, test.masks):
            true = read_mask(mask_path, None if self.settings.binary else classes)
            if self.settings.binary:
                true = (true > 0).astype(np.uint8)
            predicted = predictor.probabilities(image_path).argmax(axis=0).astype(np.uint8)
            confusion += confusion_matrix(predicted, true, classes)
        scores = dice_iou(confusion)
        names = [category.name for category in self.categories]
        return {
            "mean_dice": _plain(scores.mean_dice()),
            "mean_iou": _plain(scores.mean_iou()),
            "dice": dict(zip(names, map(_plain, scores.dice))),
            "iou": dict(zip(names, map(_plain, scores.iou))),
        }

    def write_tables(self, picture: bool = True) -> None:
        """Put all runs found in the output folder together, those of this command first."""
        results = read_results(self.settings.output)
        order = [
            method.name + suffix
            for method in self.methods
            for suffix in ("", *(f"+{name}" for name in self.variants))
        ]
        names = [category.name for category in self.categories]
        write_tables(self.settings.output, results, order, names, picture)


def read_result(folder: str) -> dict[str, Any] | None:
    """What a finished run found, or None."""
    path = os.path.join(folder, _RESULT)
    return read_json(path) if os.path.exists(path) else None


def read_results(output: str) -> list[Mapping[str, Any]]:
    """Of all finished runs, in the order of their names; a variant is a method of its own."""
    folder = os.path.join(output, "runs")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    results = []
    for result in filter(None, (read_result(os.path.join(folder, name)) for name in names)):
        train, evaluate = result["commands"][:2]
        results.append({**result, "commands": [train, evaluate]})
        for name, scores in result.get("variants", {}).items():
            method, commands = f"{result['method']}+{name}", [train, scores["command"]]
            results.append({**result, **scores, "method": method, "commands": commands})
    return results


def _pairs(images: str, masks: str) -> Pairs:
    return Pairs(images, masks, tuple(name for name, *_ in pair_files(images, masks)))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _integers(name: str, text: str, lowest: int = 0) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdigit() and int(word) >= lowest for word in words):
        raise UserError(f"--{name} {text}: expected whole numbers from {lowest} on, by commas")
    return list(dict.fromkeys(int(word) for word in words))
