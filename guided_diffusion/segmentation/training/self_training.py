"""Self-training: networks trained on a few masks label many radiographs, and a new one learns from
both (arXiv 1911.04252).

Stages: the teachers, which differ in their seed; the labels, from the mean of their predictions;
the student, which starts from the same pretrained weights as they did. Each stage resumes. What
the last one needs stays in `segm_logs/self_training`: teachers and labels can be looked at, and the
teachers serve others with --teacher_models.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, TypeVar

from guided_diffusion.networks.precision import choose
from guided_diffusion.runtime import checkpoint, rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.signals import StopRequest
from guided_diffusion.segmentation.inference.predictor import (
    Ensemble,
    check_agreement,
    load_predictor,
)
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.segmentation.training.dataset import TrainingData
from guided_diffusion.segmentation.training.job import (
    TrainingRun,
    is_complete,
    origin_of,
    start_run,
)
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.loop import Finetuner, InitialNetwork
from guided_diffusion.segmentation.training.pseudo_labels import (
    PseudoLabels,
    draw_radiographs,
    label,
)
from guided_diffusion.segmentation.training.resume import (
    Origin,
    load_interrupted,
    precision_of_origin,
    split_paths,
)

# views that the teachers' predictions are averaged over
_TTA = "shifts"
_ORIGIN = "origin.pt"

Settings = TypeVar("Settings", bound=LearningConfig)
# the network before its first step, for flags that differ in their seed
Build = Callable[[Settings], InitialNetwork]
# a stage returns the signal that stopped it
Stage = Callable[[str], str | None]


def start(
    build: Build[Settings],
    settings: Settings,
    data: TrainingData,
    sources: Mapping[str, str],
    use_fp16: bool,
) -> TrainingRun | None:
    """Begin or resume a run: in stages if the settings ask for it, else as `job.start_run`.

    :return: None if the run is complete already.
    :raises UserError: for whatever the user must correct, before anything is written.
    """
    initial = build(settings)
    if not settings.self_training:
        return start_run(initial, settings, data, sources, use_fp16)
    sources = {**sources, "teacher_models": settings.teacher_models}
    for path in split_paths(settings.teacher_models):
        check_agreement("this run", initial.config, path, load_model(path)[1])
    origin = origin_of(initial, settings, data, sources, use_fp16)
    interrupted = load_interrupted(settings, origin)
    if is_complete(interrupted, settings, len(data.train)):
        return None
    began = _began(settings, origin)
    precision, note = choose(settings.precision, use_fp16, began)
    settings = dataclasses.replace(settings, precision=precision, resume_checkpoint="")
    origin = dataclasses.replace(origin, settings=settings)
    return SelfTraining(build, settings, data, sources, use_fp16, origin, note)


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


class SelfTraining(Generic[Settings]):
    """A run in stages.

    :param build: makes the network that each stage starts from.
    :param settings: of the whole, with the precision that it computes in.
    :param data: with radiographs without masks.
    :param sources, use_fp16: see `job.start_run`.
    :param origin: what identifies the whole.
    :param note: about the precision, for the logs.
    """

    def __init__(
        self,
        build: Build[Settings],
        settings: Settings,
        data: TrainingData,
        sources: Mapping[str, str],
        use_fp16: bool,
        origin: Origin,
        note: str,
    ):
        self.build = build
        self.settings = settings
        self.data = data
        self.sources = sources
        self.use_fp16 = use_fp16
        self.origin = origin
        self.note = note
        self.stopped_by: str | None = None
        self._student: Finetuner | None = None
        self._stop = StopRequest()

    @property
    def last_path(self) -> str:
        """The file that only resuming needs."""
        return self.settings.last_path

    def outcome(self) -> str:
        """The result of a run to its end, in lines of the log."""
        return self._student.outcome() if self._student else ""

    def run(self) -> None:
        """Go through the stages that are left, until a signal, which `stopped_by` then names."""
        checkpoint.save(self._path(_ORIGIN), self.origin.to_plain())
        stages = self._stages()
        with self._stop as stop:
            for number, (name, stage) in enumerate(stages, 1):
                self.stopped_by = stage(f"{number}/{len(stages)} {name}")
                if number < len(stages):
                    self.stopped_by = self.stopped_by or stop.requested
                if self.stopped_by:
                    return

    def _stages(self) -> list[tuple[str, Stage]]:
        settings = self.settings
        stages: list[tuple[str, Stage]] = [
            (f"teacher {number}", partial(self._teach, number))
            for number in range(1, settings.teachers + 1)
        ]
        for turn in range(1, settings.rounds + 1):
            stages += [
                ("labels", partial(self._label, turn)),
                ("student", partial(self._learn, turn)),
            ]
        return stages

    def _path(self, name: str) -> str:
        return os.path.join(self.settings.stages_folder, name)

    def _teacher_path(self, number: int) -> str:
        return self._path(f"teacher_{number}.pth")

    def _student_path(self, turn: int) -> str:
        last = turn == self.settings.rounds
        return self.settings.weights_save if last else self._path(f"student_{turn}.pth")

    def _load_labels(self, turn: int) -> PseudoLabels | None:
        return PseudoLabels.load(self._path(f"labels_{turn}.pt"))

    def _teach(self, number: int, stage: str) -> str | None:
        """Train a teacher; the first is the network that the same flags train on masks alone."""
        labels = self._load_labels(1)
        if labels and labels.complete:
            return None
        seed = self.settings.seed
        if number > 1:
            seed = rng.derive_seed(seed, "teacher", number)
        settings = dataclasses.replace(
            self.settings,
            unlabeled_dir="",
            teacher_models="",
            seed=seed,
            weights_save=self._teacher_path(number),
        )
        finetuner = self._begin(settings, dataclasses.replace(self.data, unlabelled=None), stage)
        if finetuner is None:
            return None
        finetuner.run(self._stop)
        return finetuner.stopped_by

    def _label(self, turn: int, stage: str) -> str | None:
        """Label the radiographs with the teachers, and in later rounds with the student as well."""
        labels = self._load_labels(turn) or PseudoLabels(
            self._path(f"labels_{turn}.pt"), self._draw()
        )
        if labels.complete:
            return None
        settings = self.settings
        models = [self._teacher_path(n) for n in range(1, settings.teachers + 1)]
        models += split_paths(settings.teacher_models)
        models += [self._student_path(turn - 1)] if turn > 1 else []
        precision = settings.precision
        teachers = Ensemble([load_predictor(m, tta=_TTA, precision=precision) for m in models])
        paths = self._paths(labels)
        reading = self.origin.config.reading
        with progress_bar(len(paths), "image", initial=len(labels.masks), desc=stage) as bar:
            label(labels, teachers, reading, paths, settings.confidence, bar, self._stop)
        return self._stop.requested

    def _paths(self, labels: PseudoLabels) -> list[str]:
        """Of the radiographs drawn, whatever their files are named by now."""
        radiographs = self.data.unlabelled
        assert radiographs is not None
        places = dict(zip(radiographs.digests, radiographs.names))
        return [places[digest] for digest in labels.drawn]

    def _draw(self) -> list[str]:
        """Hashes of the radiographs to label."""
        radiographs, settings = self.data.unlabelled, self.settings
        assert radiographs is not None
        names, digests = radiographs.names, radiographs.digests
        drawn = draw_radiographs(names, digests, settings.unlabeled_images, settings.seed)
        return [digests[number] for number in drawn]

    def _learn(self, turn: int, stage: str) -> str | None:
        """Train a student on masks and labels."""
        self._forget_optimizers()
        labels, drop = self._load_labels(turn), self.settings.drop_uncertain
        assert labels is not None
        labels.write_table(self._path(f"labels_{turn}.csv"), self._paths(labels), drop)
        pairs = labels.pairs(drop, self.data.train.window)
        if not pairs.with_foreground():
            raise UserError(
                f"--confidence {self.settings.confidence}: no pixel of the radiographs without"
                " masks is labelled as anything but background: train the teachers longer, or pass"
                f" those in {self.settings.stages_folder} to another run by --teacher_models, with"
                " a lower confidence"
            )
        settings = dataclasses.replace(self.settings, weights_save=self._student_path(turn))
        finetuner = self._begin(settings, dataclasses.replace(self.data, pseudo=pairs), stage)
        if finetuner is None:
            return None
        finetuner.run(self._stop)
        self._student = finetuner
        return finetuner.stopped_by

    def _begin(self, settings: Settings, data: TrainingData, stage: str) -> Finetuner | None:
        initial = self.build(settings)
        messages = [*initial.messages, *([self.note] if self.note else [])]
        initial = dataclasses.replace(initial, messages=messages)
        return start_run(initial, settings, data, self.sources, self.use_fp16, stage)

    def _forget_optimizers(self) -> None:
        """Remove what only resuming the teachers needed."""
        for number in range(1, self.settings.teachers + 1):
            settings = dataclasses.replace(self.settings, weights_save=self._teacher_path(number))
            if os.path.exists(settings.last_path):
                os.remove(settings.last_path)
