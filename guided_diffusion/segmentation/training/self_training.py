"""Self-training: networks trained on a few masks label many radiographs, and a new one learns from
both (arXiv 1911.04252).

Stages: the teachers, which differ in their seed; the labels, from the mean of their predictions;
the student, which starts from the same pretrained weights as they did. Each stage resumes. What
the last one needs stays in `segm_logs/stages`: teachers and labels can be looked at, and the
teachers serve others with --teacher_models.
"""

import dataclasses
import os
from functools import partial

from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.segmentation.inference.predictor import Ensemble, load_predictor
from guided_diffusion.segmentation.training.pseudo_labels import (
    PseudoLabels,
    draw_radiographs,
    label,
)
from guided_diffusion.segmentation.training.resume import split_paths
from guided_diffusion.segmentation.training.stages import Settings, Stage, StagedRun

# views that the teachers' predictions are averaged over
_TTA = "shifts"


class SelfTraining(StagedRun[Settings]):
    """A run whose data has radiographs without masks, and whose network learns from all."""

    def outcome(self) -> str:
        """The result of a run to its end, in lines of the log."""
        return self.outcomes[-1] if self.outcomes else ""

    def stages(self) -> list[tuple[str, Stage]]:
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

    def _teacher_paths(self) -> list[str]:
        return [self._teacher_path(n) for n in range(1, self.settings.teachers + 1)]

    def _teacher_path(self, number: int) -> str:
        return self.path(f"teacher_{number}.pth")

    def _student_path(self, turn: int) -> str:
        last = turn == self.settings.rounds
        return self.settings.weights_save if last else self.path(f"student_{turn}.pth")

    def _load_labels(self, turn: int) -> PseudoLabels | None:
        return PseudoLabels.load(self.path(f"labels_{turn}.pt"))

    def _teach(self, number: int, stage: str) -> str | None:
        """Train a teacher; the first is the network that the same flags train on masks alone."""
        if self._load_labels(1):  # labels of one set of teachers, also where the run gets longer
            return None
        seed = self.settings.seed
        if number > 1:
            seed = rng.derive_seed(seed, "teacher", number)
        settings = dataclasses.replace(
            self.settings, seed=seed, weights_save=self._teacher_path(number)
        )
        return self.train_on_masks(self.build, settings, stage)

    def _label(self, turn: int, stage: str) -> str | None:
        """Label the radiographs with the teachers, and in later rounds with the student as well."""
        labels = self._load_labels(turn) or PseudoLabels(
            self.path(f"labels_{turn}.pt"), self._draw()
        )
        if labels.complete:
            return None
        settings = self.settings
        models = [*self._teacher_paths(), *split_paths(settings.teacher_models)]
        models += [self._student_path(turn - 1)] if turn > 1 else []
        precision = settings.precision
        teachers = Ensemble([load_predictor(m, tta=_TTA, precision=precision) for m in models])
        paths = self._paths(labels)
        reading = self.origin.config.reading
        with progress_bar(len(paths), "image", initial=len(labels.masks), desc=stage) as bar:
            label(labels, teachers, reading, paths, settings.confidence, bar, self.stop)
        return self.stop.requested

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
        """Train a student on masks and labels; one that has labelled stays as it is."""
        if self._load_labels(turn + 1):
            return None
        self._forget_optimizers()
        labels, drop = self._load_labels(turn), self.settings.drop_uncertain
        assert labels is not None
        labels.write_table(self.path(f"labels_{turn}.csv"), self._paths(labels), drop)
        pairs = labels.pairs(drop, self.data.train.window)
        if not pairs.with_foreground():
            raise UserError(
                f"--confidence {self.settings.confidence}: no pixel of the radiographs without"
                " masks is labelled as anything but background: train the teachers longer, or pass"
                f" those in {self.settings.stages_folder} to another run by --teacher_models, with"
                " a lower confidence"
            )
        settings = dataclasses.replace(self.settings, weights_save=self._student_path(turn))
        return self.train(self.build, settings, dataclasses.replace(self.data, pseudo=pairs), stage)

    def _forget_optimizers(self) -> None:
        """Remove what only resuming the teachers needed."""
        for path in self._teacher_paths():
            settings = dataclasses.replace(self.settings, weights_save=path)
            if os.path.exists(settings.last_path):
                os.remove(settings.last_path)
