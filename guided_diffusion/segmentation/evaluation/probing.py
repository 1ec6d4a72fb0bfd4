"""From flags to linear probes, of a network in training and of the checkpoints of a run."""

import dataclasses
import re
from typing import Any

import blobfile as bf
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.images.masks import MaskRule
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.storage.files import check_output
from guided_diffusion.runtime.storage.resume import is_ema, parse_resume_step_from_filename
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.evaluation.linear_probe import linear_probe
from guided_diffusion.segmentation.evaluation.probe_config import ProbeConfig, TrainingProbeConfig
from guided_diffusion.segmentation.evaluation.probe_curve import (
    JSON_NAME,
    PICTURE_NAME,
    Point,
    ProbeCurve,
)
from guided_diffusion.segmentation.training.dataset import (
    LabelledImages,
    check_masks,
    load_labelled,
)
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.job import (
    describe_classes,
    find_table,
    reading_of_pairs,
    shared_with_validation,
)
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.run import Run


class LabelledSplit:
    """The labelled images of a folder, TRAIN and VAL, each with IMG and MASK.

    :raises UserError: for folders that are missing, files that do not pair, and masks that do not
        fit the class table.
    """

    def __init__(self, folder: str, categories: str):
        parts = []
        for part in ("TRAIN", "VAL"):
            images, masks = (bf.join(folder, part, kind) for kind in ("IMG", "MASK"))
            if missing := [path for path in (images, masks) if not bf.isdir(path)]:
                raise UserError(
                    f"{missing[0]} is missing: labelled images lie in TRAIN/IMG, TRAIN/MASK,"
                    f" VAL/IMG and VAL/MASK below {folder}; tools/prepare_data.py --action organize"
                    " makes such a folder"
                )
            parts.append((images, masks))
        self.folders = Folders(*parts)
        self.categories: ClassTable = find_table(self.folders, 0, categories, False, -1)
        self.rule: MaskRule = self.categories.mask_rule()
        for images, masks in self.folders.pairs:
            check_masks(images, masks, self.rule)

    def read(self, pretrained: ReadingConfig) -> tuple[LabelledImages, LabelledImages, list[str]]:
        """Both parts at the network's size, read as fine-tuning would, and lines for the log."""
        reading, notes = reading_of_pairs(pretrained, {})
        train, val = (load_labelled(*pair, reading, self.rule) for pair in self.folders.pairs)
        shared = shared_with_validation(self.folders, (), train, val)
        notes += [shared] if shared else []
        return train, val, [describe_classes(self.categories), *notes]


class Prober:
    """Probes networks that read images alike, and keeps the curve of their scores.

    :param folder: of the curve's files.
    """

    def __init__(
        self,
        split: LabelledSplit,
        reading: ReadingConfig,
        folder: str,
        device: th.device | str,
        last_step: int | None = None,
    ):
        self.categories = split.categories
        self.train, self.val, self.notes = split.read(reading)
        self.device = device
        files = {
            part: dict(zip(data.names, data.digests))
            for part, data in (("train", self.train), ("val", self.val))
        }
        self.curve = ProbeCurve(folder, self.categories, files, self.val.names)
        self.curve.load(last_step)

    def probe(self, trained: Trained[ModelConfig], step: int) -> tuple[Point, str]:
        """The point of these weights, now part of the curve, and what to tell the user."""
        classes = len(self.categories)
        scores = linear_probe(trained, self.train, self.val, classes, self.device)
        point = Point.of(step, scores)
        return point, self.curve.add(point)


def training_probe(overrides: Overrides) -> "TrainingProbe | None":
    """What makes a pretraining probe, if the flags ask for it; checked as far as can be now.

    :raises UserError: for flags without effect, or images that cannot be used.
    """
    config = from_flags(TrainingProbeConfig, overrides)
    if not config.probe_dir:
        given = [
            f"--{name}" for name in ("probe_interval", "probe_categories") if name in overrides
        ]
        if given:
            raise UserError(f"{given[0]} needs --probe_dir: name a folder of labelled images")
        return None
    if overrides.get("segmentation_guided"):
        raise UserError(
            "--probe_dir does not apply to --segmentation_guided True, whose networks are given the"
            " masks: leave it out"
        )
    split = (
        LabelledSplit(config.probe_dir, config.probe_categories) if dist_util.is_main() else None
    )
    return TrainingProbe(config.probe_interval, split)


@dataclasses.dataclass(frozen=True)
class TrainingProbe:
    """Makes the arguments of TrainLoop with which a run probes every `interval` steps.

    split: the labelled images; None on ranks other than 0, which do not probe.
    """

    interval: int
    split: LabelledSplit | None

    def __call__(self, run: Run[ModelConfig, TrainConfig]) -> dict[str, Any]:
        """:raises UserError: for images that cannot be read."""
        if self.split is None:
            return {"probe_interval": self.interval}
        prober = Prober(self.split, run.reading, run.folder, dist_util.dev(), run.start.step)
        for note in prober.notes:
            logger.log(f"probe: {note}")

        def probe(network: th.nn.Module, step: int) -> None:
            trained = Trained(
                model=run.model,
                diffusion=run.diffusion,
                reading=run.reading,
                classes=run.classes,
                path=f"step {step}",
                weights=network.state_dict(),
            )
            point, said = prober.probe(trained, step)
            logger.logkv("probe_dice", point.dice)
            for category in prober.categories[1:]:
                logger.logkv(f"probe_dice {category.name}", point.classes[category.index])
            logger.log(said)

        return {"probe_interval": self.interval, "probe_fn": probe}


def probe_run(config: ProbeConfig, run: str, split_folder: str) -> None:
    """Probe all checkpoints of a run that its curve lacks.

    :param run: the run's folder.
    :param split_folder: see LabelledSplit.
    """
    device = dist_util.open_device()
    output = config.output or run
    paths = averaged_checkpoints(run)
    split = LabelledSplit(split_folder, config.categories)
    check_output(output, folder=True)
    run_lock.hold_folder(output, "choose another --output")
    newest: Trained[ModelConfig] = read_trained(paths[max(paths)], {}, for_tuning=True)
    prober = Prober(split, newest.reading, output, device)
    for note in prober.notes:
        say(note)
    todo = [step for step in sorted(paths) if step not in prober.curve]
    with progress_bar(len(todo), "checkpoint") as bar:
        for step in todo:
            prober.probe(read_trained(paths[step], {}, for_tuning=True), step)
            bar.update()
    for point in prober.curve.points:
        print(f"{point.step:>9}  {point.dice:.4f}")
    print(prober.curve.verdict())
    print(f"curve in {bf.join(output, JSON_NAME)} and {bf.join(output, PICTURE_NAME)}")


def averaged_checkpoints(folder: str) -> dict[int, str]:
    """The file of each step in a run's folder: of the highest EMA rate, or else of the model.

    :raises UserError: if there is none.
    """
    found: dict[int, str] = {}
    if bf.isdir(folder):
        names = [n for n in bf.listdir(folder) if re.fullmatch(r"(model|ema_[\d.e-]+_)\d+\.pt", n)]
        for name in sorted(names, key=_rate):
            found[parse_resume_step_from_filename(name)] = bf.join(folder, name)
    if not found:
        raise UserError(f"{folder} holds no checkpoints: name the folder of a pretraining run")
    return found


def _rate(name: str) -> float:
    """The rate in the name of an EMA file; below all rates for a model file."""
    return float(name.split("_")[1]) if is_ema(name) else -1.0
