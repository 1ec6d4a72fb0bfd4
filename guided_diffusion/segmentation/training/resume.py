"""Resuming: what identifies a run, and what an interrupted one left."""

import dataclasses
import os
from typing import Any, TypedDict

import torch as th

from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.training.learning import LearningConfig


@dataclasses.dataclass(frozen=True)
class Origin:
    """What identifies a run: the same command resumes it, any other is refused.

    checkpoint: file name of the pretrained checkpoint, "" without one. train, val: names of the
    images. settings: the flags, of which `MAY_CHANGE` do not count. config: the network.
    """

    checkpoint: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    settings: LearningConfig
    config: SegmentationConfig

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
        }


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

    :raises UserError: if the files are another command's, naming the first difference.
    """
    best, last = settings.weights_save, settings.last_path
    if settings.resume_checkpoint == "none":
        for path in (best, last, settings.log_folder):
            _move_aside(path)
        return None
    found = _load_same(last, origin)
    if found is None and _load_same(best, origin):
        _move_aside(best)  # the run was killed between saving its first two files
    return found


def _load_same(path: str, origin: Origin) -> SavedRun | None:
    if not os.path.exists(path):
        return None
    saved = checkpoint.load(path)
    theirs = saved.get("origin", {}) if isinstance(saved, dict) else {}
    for name, value in origin.to_plain().items():
        if theirs.get(name) != value:
            raise UserError(
                f"{path} belongs to another run, with {name} {theirs.get(name)!r} instead of"
                f" {value!r}: choose another --weights_save, or move it aside with"
                " --resume_checkpoint none"
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
