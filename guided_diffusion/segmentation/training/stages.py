"""Training in stages, each of which trains a network or prepares for another; each resumes."""

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from guided_diffusion.networks.precision import choose
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.signals import StopRequest
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation.training.dataset import TrainingData
from guided_diffusion.segmentation.training.job import start_run
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.loop import InitialNetwork
from guided_diffusion.segmentation.training.resume import Origin, precision_of_origin

_ORIGIN = "origin.pt"

Settings = TypeVar("Settings", bound=LearningConfig)
# the network before its first step, for flags that differ in their seed
Build = Callable[[Settings], InitialNetwork]
# a stage returns the signal that stopped it
Stage = Callable[[str], str | None]


class StagedRun(ABC, Generic[Settings]):
    """A run in stages.

    :param build: makes the network that stages start from.
    :param settings: of the whole.
    :param data: to learn from.
    :param sources, use_fp16: see `job.start_run`.
    :param origin: what identifies the whole.
    :raises UserError: if the stages there are another command's, or learnt from other contents.
    """

    def __init__(
        self,
        build: Build[Settings],
        settings: Settings,
        data: TrainingData,
        sources: Mapping[str, str],
        use_fp16: bool,
        origin: Origin,
    ):
        self.build = build
        self.data = data
        self.sources = sources
        self.use_fp16 = use_fp16
        precision, self.note = choose(settings.precision, use_fp16, _began(settings, origin))
        self.settings = dataclasses.replace(settings, precision=precision, resume_checkpoint="")
        self.origin = dataclasses.replace(origin, settings=self.settings)
        self.stopped_by: str | None = None
        self.outcomes: list[str] = []
        self.stop = StopRequest()

    @property
    def last_path(self) -> str:
        """The file that only resuming needs."""
        return self.settings.last_path

    @abstractmethod
    def outcome(self) -> str:
        """The result of a run to its end, in lines of the log."""

    @abstractmethod
    def stages(self) -> list[tuple[str, Stage]]:
        """What to do, and its name for the progress bar, in order."""

    def run(self) -> None:
        """Go through the stages that are left, until a signal, which `stopped_by` then names."""
        checkpoint.save(self.path(_ORIGIN), self.origin.to_plain())
        stages = self.stages()
        with self.stop as stop:
            for number, (name, stage) in enumerate(stages, 1):
                title = f"{number}/{len(stages)} {name}"
                say(title)
                self.stopped_by = stage(title)
                if number < len(stages):
                    self.stopped_by = self.stopped_by or stop.requested
                if self.stopped_by:
                    return

    def path(self, name: str) -> str:
        """Of a file that a stage leaves for another."""
        return os.path.join(self.settings.stages_folder, name)

    def train(
        self, build: Build[Settings], settings: Settings, data: TrainingData, stage: str
    ) -> str | None:
        """Train a network, or go on; `outcomes` then says how it ended, unless it was complete."""
        initial = build(settings)
        messages = [*initial.messages, *([self.note] if self.note else [])]
        initial = dataclasses.replace(initial, messages=messages)
        finetuner = start_run(initial, settings, data, self.sources, self.use_fp16, stage)
        if finetuner is None:
            return None
        finetuner.run(self.stop)
        self.outcomes.append(finetuner.outcome())
        return finetuner.stopped_by

    def train_on_masks(self, build: Build[Settings], settings: Settings, stage: str) -> str | None:
        """`train`, without the radiographs that have none."""
        settings = dataclasses.replace(settings, unlabeled_dir="", teacher_models="")
        return self.train(build, settings, dataclasses.replace(self.data, unlabelled=None), stage)


def _began(settings: LearningConfig, origin: Origin) -> str:
    """The precision in which an earlier run of the same command began, "" for none.

    :raises UserError: if the stages are another command's or learnt from other contents.
    """
    path = os.path.join(settings.stages_folder, _ORIGIN)
    if not os.path.exists(path):
        return ""
    theirs = checkpoint.load(path)
    if found := origin.differences(theirs):
        raise UserError(
            f"{settings.stages_folder} belongs to another run ({'; '.join(found)}): choose another"
            " --weights_save, or start anew with --resume_checkpoint none, which moves it aside"
        )
    return precision_of_origin(theirs)
