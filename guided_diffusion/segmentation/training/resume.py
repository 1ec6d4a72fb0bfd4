"""Resuming: what identifies a run, and what an interrupted one left."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch as th

from guided_diffusion.runtime.command_line.precision_flag import AUTO
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint, packed
from guided_diffusion.runtime.storage.contents import Files, changed_files, changes, digest
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.training.dataset import TrainingData
from guided_diffusion.segmentation.training.layers import learning_rate
from guided_diffusion.segmentation.training.learning import LearningConfig

# what a run's length comes from: longer, the same run goes on
_LENGTH = ("epochs", "steps", "student_steps")
# names of files and folders, which do not count where the contents are known
_BY_NAME = (
    *("checkpoint", "load", "encoder_weights", "train", "val"),
    *("train_names", "synthetic_dir", "unlabeled_dir", "teacher_models"),
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What identifies a run: the same command resumes it, any other is refused.

    checkpoint: file name of the pretrained checkpoint, "" without one. train, val: names of the
    images. settings: the flags, of which `MAY_CHANGE` do not count. config: the network. files: see
    `contents_of`. more: further plain values that change the result.
    """

    checkpoint: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    settings: LearningConfig
    config: SegmentationConfig
    files: Files
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As model files hold it, under "origin"."""
        settings = dataclasses.asdict(self.settings)
        config = self.config.to_plain()
        del config["flip_swaps"]  # the flags say it already
        return {
            "checkpoint": self.checkpoint,
            "train": list(self.train),
            "val": list(self.val),
            **{k: v for k, v in settings.items() if k not in self.settings.MAY_CHANGE},
            **config,
            **self.more,
            "files": self.files,
        }

    def differences(self, theirs: Mapping[str, Any]) -> list[str]:
        """How this run differs from the one whose `to_plain` is given; [] if it does not.

        Older files lack what later versions added: flags had their defaults, the rest is unknown.
        A precision that the flags leave open is that of the other run. A run that is only longer
        is the same.
        """
        ours = self.to_plain()
        if self.steps() >= self.steps_before(theirs):
            ours = {name: value for name, value in ours.items() if name not in _LENGTH}
        defaults = {f.name: f.default for f in dataclasses.fields(self.settings)}
        files = theirs.get("files")
        found = [] if files is None else changed_files(files, self.files)
        if theirs.get("unlabeled_dir") and "teachers" not in theirs:
            found.append("unlabeled_dir: by the mean teacher of an older version")
        theirs = {**theirs, "precision": precision_of_origin(theirs)}
        if self.settings.precision in AUTO:
            ours["precision"] = theirs["precision"]
        for name in ours.keys() - {"files", *(_BY_NAME if files is not None else ())}:
            found += changes(name, theirs.get(name, defaults.get(name, ours[name])), ours[name])
        return sorted(found)

    def steps(self) -> int:
        """The length of the run."""
        return self.settings.length(len(self.train)).steps

    def steps_before(self, theirs: Mapping[str, Any]) -> int:
        """The length that the flags in the other run's `to_plain` give this one."""
        length = {name: theirs[name] for name in _LENGTH if name in theirs}
        return dataclasses.replace(self.settings, **length).length(len(self.train)).steps

    def extended(self, saved: "SavedRun") -> tuple["Origin", list[str]]:
        """This origin with the steps at which the run was made longer, and lines for the log."""
        theirs, step = saved["origin"], saved["stepper"]["steps"]
        points = list(theirs.get("extended", []))
        notes = []
        if (before := self.steps_before(theirs)) < self.steps():
            points.append(step)
            rates = [learning_rate(self.settings, step, n) for n in (before, self.steps())]
            notes.append(
                f"extended from {before} to {self.steps()} steps, now at step {step}: the learning"
                f" rate follows the schedule of the longer run from here on, {rates[1]:.3g} instead"
                f" of {rates[0]:.3g}"
            )
        return dataclasses.replace(self, more={**self.more, "extended": points}), notes


def precision_of_origin(origin: Mapping[str, Any]) -> str:
    """The precision of the run whose `Origin.to_plain` is given.

    Older versions recorded the flag alone: without it the run is float32, or float16 with use_fp16.
    """
    named = origin.get("precision", "")
    return named if named not in AUTO else "fp16" if origin.get("use_fp16") else "fp32"


def contents_of(sources: Mapping[str, str], data: TrainingData) -> Files:
    """The contents that a run learns from.

    :param sources: paths of weights by flag, some with commas between; what is no file, such as
        "imagenet", counts as it is.
    """
    files: Files = {}
    for flag, text in sources.items():
        if text:
            paths = split_paths(text)
            names = paths if len(paths) > 1 else [os.path.basename(text.rstrip("/"))]
            contents = [
                digest(path) if os.path.isfile(path) or packed.find(path) else path
                for path in paths
            ]
            files[flag] = dict(zip(names, contents))
    for part in ("train", "val", "synthetic"):
        if (images := getattr(data, part)) is not None:
            files[part] = dict(zip(images.names, images.digests))
    if data.unlabelled is not None:
        files["unlabeled_dir"] = dict(zip(data.unlabelled.names, data.unlabelled.digests))
    return files


def split_paths(text: str) -> list[str]:
    """The files in a comma-separated list; a file whose name holds a comma is named alone."""
    return [text] if os.path.exists(text) else [path for path in text.split(",") if path]


def in_saved_order(data: TrainingData, files: Files) -> TrainingData:
    """The data in the order in which a run began, if the files were renamed meanwhile."""
    for part in ("train", "val", "synthetic"):
        images, saved = getattr(data, part), list(files.get(part, {}).values())
        if images is not None and list(images.digests) != saved:
            places: dict[str, list[int]] = {}
            for number, found in enumerate(images.digests):
                places.setdefault(found, []).append(number)
            chosen = images.choose([places[found].pop(0) for found in saved])
            data = dataclasses.replace(data, **{part: chosen})
    return data


class BestScores(TypedDict, total=False):
    """Validation scores of the best network so far; only its epoch without validation images.

    mean_iou, mean_dice: over the foreground classes that the masks show. iou, dice: of each class,
    nan if no mask shows it. loss: over all images.
    """

    epoch: int
    loss: float
    mean_iou: float
    mean_dice: float
    iou: list[float]
    dice: list[float]


class SavedRun(TypedDict):
    """What the file for resuming holds besides the configuration."""

    origin: dict[str, Any]
    state_dict: dict[str, th.Tensor]
    ema: dict[str, th.Tensor]
    opt: dict[str, Any]
    stepper: dict[str, Any]
    epoch: int
    best: BestScores


def load_interrupted(settings: LearningConfig, origin: Origin) -> SavedRun | None:
    """What an earlier run of the same command left, or None; files in the way are moved aside.

    :raises UserError: if the files are another command's or learnt from other contents, naming the
        differences; or if the best network is gone.
    """
    best, last = settings.weights_save, settings.last_path
    if settings.resume_checkpoint == "none":
        for path in (best, last, settings.log_folder):
            _move_aside(path)
        return None
    found, beside = _load_same(last, origin), _load_same(best, origin)
    if found is None and beside is not None:
        _move_aside(best)  # the run was killed between saving its first two files
    if found is not None and beside is None and found["best"].get("epoch"):
        raise UserError(
            f"{best} is missing, the best network of the run that {last} belongs to: put it back,"
            " or start anew with --resume_checkpoint none"
        )
    return found


def load_finished(
    settings: LearningConfig, origin: Origin, needed_to_extend: Sequence[str]
) -> bool:
    """Whether an earlier run of the same command, which writes its files at its end, finished.

    Files in the way are moved aside if the settings say so.

    :param needed_to_extend: files of the finished run that a longer one goes on from.
    :raises UserError: if the files are another command's or learnt from other contents, or if a
        longer run cannot go on from them.
    """
    if settings.resume_checkpoint == "none":
        load_interrupted(settings, origin)
        return False
    found = [_load_same(path, origin) for path in (settings.last_path, settings.weights_save)]
    if not all(found):
        return False
    if all(origin.steps_before(saved["origin"]) >= origin.steps() for saved in found if saved):
        return True
    if missing := [path for path in needed_to_extend if not os.path.exists(path)]:
        raise UserError(
            f"{settings.weights_save} is complete, and to train it longer {missing[0]} is missing:"
            " put it back, or start anew with --resume_checkpoint none"
        )
    return False


def _load_same(path: str, origin: Origin) -> SavedRun | None:
    if not os.path.exists(path):
        return None
    saved = checkpoint.load(path)
    theirs = saved.get("origin") if isinstance(saved, dict) else None
    found = origin.differences(theirs) if theirs else ["no record of a training"]
    if found:
        raise UserError(
            f"{path} belongs to another run ({'; '.join(found)}): choose another --weights_save, or"
            " start anew with --resume_checkpoint none, which moves it aside"
        )
    return saved


def _move_aside(path: str) -> None:
    """Rename a file or folder to the first of PATH.old, PATH.old2, ... that is free."""
    if os.path.exists(path):
        aside, number = f"{path}.old", 1
        while os.path.exists(aside):
            number += 1
            aside = f"{path}.old{number}"
        os.rename(path, aside)
