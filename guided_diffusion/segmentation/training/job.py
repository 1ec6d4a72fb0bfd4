"""The steps from flags to a run that fine-tuning and the baselines share."""

import csv
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.images.duplicates import fingerprint
from guided_diffusion.images.files import pair_files
from guided_diffusion.images.patients import shared_patients
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.precision import choose
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.segmentation.categories import (
    Category,
    ClassTable,
    load_categories,
    resolve_categories,
    table_of_masks,
)
from guided_diffusion.segmentation.model_file import swaps_of_training
from guided_diffusion.segmentation.training.augment import check_flips
from guided_diffusion.segmentation.training.dataset import (
    LabelledImages,
    TrainingData,
    choose_pairs,
    count_classes,
    load_labelled,
)
from guided_diffusion.segmentation.training.folders import Folders
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.loop import Finetuner, InitialNetwork
from guided_diffusion.segmentation.training.resume import (
    Origin,
    SavedRun,
    contents_of,
    in_saved_order,
    load_interrupted,
    precision_of_origin,
)
from guided_diffusion.segmentation.training.unlabelled import load_unlabelled


def find_table(
    folders: Folders, number: int, path: str, binary: bool, ignore_index: int
) -> ClassTable:
    """The class table that the flags ask for, or that of the masks' folder, or else one for the
    classes in all masks.

    :raises UserError: if that of the folder does not list all classes of the masks.
    """
    beside = "" if path or number or binary else table_of_masks(folders.train[1])
    if beside:
        table = load_categories(beside)
        count = 0 if table.ignored else count_classes(folders.pairs, ignore_index)
        if count > len(table):
            raise UserError(
                f"{beside} lists {len(table)} classes, but the masks hold the value {count - 1}:"
                " correct one of them, or name another table with --categories"
            )
        return table.ignoring(ignore_index)
    return resolve_categories(
        lambda: count_classes(folders.pairs, ignore_index), number, path, binary, ignore_index
    )


def split_names(text: str) -> list[str]:
    """The names in a comma-separated list; in quotes, "a,b", a name may hold a comma."""
    row = next(csv.reader([text], skipinitialspace=True), [])
    return [name.strip() for name in row if name.strip()]


def join_names(names: Sequence[str]) -> str:
    """The list that `split_names` takes apart."""
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow(names)
    return row.getvalue()


def reading_of_pairs(
    pretrained: ReadingConfig, overrides: Overrides
) -> tuple[ReadingConfig, list[str]]:
    """How radiographs and masks are read, by default as in pretraining but for a crop.

    A crop would remove parts that carry labels and leave them without a prediction, so images are
    padded instead.

    :return: also lines for the log.
    """
    default = "pad" if pretrained.resize == "crop" else pretrained.resize
    reading = from_flags(ReadingConfig, overrides, dataclasses.replace(pretrained, resize=default))
    return reading, about_reading(reading, pretrained, "resize" not in overrides)


def about_reading(
    reading: ReadingConfig, pretrained: ReadingConfig, padded_by_default: bool
) -> list[str]:
    """How images are read otherwise than in pretraining, in lines of the log."""
    messages = []
    for name in vars(reading):
        now, before = getattr(reading, name), getattr(pretrained, name)
        if name != "in_channels" and now != before:
            messages.append(f"--{name} {now}; the pretraining read with {before}")
            if name == "resize" and padded_by_default:
                messages[-1] += ", which would cut off parts that carry labels"
    if reading.resize == "crop":
        messages.append("--resize crop: what it cuts off is neither learnt nor predicted")
    return messages


def read_data(settings: LearningConfig, folders: Folders, reading: ReadingConfig) -> TrainingData:
    """Read and check all images of a run, and find its class table."""
    categories = find_table(
        folders, settings.out_channels, settings.categories, settings.binary, settings.ignore_index
    )
    check_flips(categories, settings.flip, settings.flip_swap)
    rule = categories.mask_rule(settings.binary)
    names = split_names(settings.train_names)
    train = load_labelled(*folders.train, reading, rule, names)
    val = load_labelled(*folders.val, reading, rule) if folders.val else None
    synthetic = unlabelled = None
    if settings.synthetic_dir:
        image_dir, mask_dir = (os.path.join(settings.synthetic_dir, k) for k in ("IMG", "MASK"))
        synthetic = load_labelled(image_dir, mask_dir, reading, rule)
    if settings.unlabeled_dir:
        unlabelled = load_unlabelled(settings.unlabeled_dir, reading)
    shared = shared_with_validation(folders, names, train, val)
    return TrainingData(categories, train, val, synthetic, unlabelled, shared)


def shared_with_validation(
    folders: Folders, names: Sequence[str], train: LabelledImages, val: LabelledImages | None
) -> str:
    """Images of one patient, or the same, in TRAIN and VAL, as a warning; "" if none are known.

    :raises UserError: if all images of VAL are in TRAIN.
    :param names: of the images of TRAIN that count; () for all.
    """
    if folders.val is None or val is None:
        return ""
    pairs = choose_pairs(pair_files(*folders.train), names), pair_files(*folders.val)
    one, other = ([(name, image) for name, image, _ in side] for side in pairs)
    digests = [fingerprint(image).digest for image in (*train.images, *val.images)]
    known = dict(zip(digests, one))
    again = [known[found] for found in digests[len(one) :] if found in known]
    if len(again) == len(other):
        raise UserError(
            f"VAL holds nothing but radiographs of TRAIN, such as {again[0][1]}: scores on them"
            " say nothing about unseen ones; name other folders for VAL, or none"
        )
    shared = shared_patients(one, other, digests)
    return shared and f"warning: scores on VAL will be too high: {shared}"


class TrainingRun(Protocol):
    """A training that a command runs: of one network, or in stages.

    stopped_by: the signal that stopped it, if any.
    """

    stopped_by: str | None

    @property
    def last_path(self) -> str:
        """The file that only resuming needs."""

    def run(self) -> None:
        """Train to the end or until a signal."""

    def outcome(self) -> str:
        """The result of a run to its end, in lines of the log."""


def origin_of(
    initial: InitialNetwork,
    settings: LearningConfig,
    data: TrainingData,
    sources: Mapping[str, str],
    use_fp16: bool,
) -> Origin:
    """What identifies a run; parameters as of `start_run`."""
    val = data.val.names if data.val else ()
    more: dict[str, Any] = {"use_fp16": use_fp16}
    if initial.noised_input is not None:
        more["diffusion"] = dataclasses.asdict(initial.noised_input.diffusion)
    return Origin(
        os.path.basename(sources.get("load") or sources["checkpoint"]),
        *(data.train.names, val, settings, initial.config),
        contents_of(sources, data),
        more,
    )


def is_complete(interrupted: SavedRun | None, settings: LearningConfig, images: int) -> bool:
    """Whether an earlier run of the same command, on that many images, came to its end."""
    done = interrupted["stepper"]["steps"] if interrupted else -1
    return done >= settings.length(images).steps


def start_run(
    initial: InitialNetwork,
    settings: LearningConfig,
    data: TrainingData,
    sources: Mapping[str, str],
    use_fp16: bool,
    stage: str = "",
) -> Finetuner | None:
    """Begin a run, or resume what an earlier run of the same command left; open the log.

    :param sources: files that the network was made from, by flag; "" for none.
    :param use_fp16: float16 on a GPU, if neither the settings nor the earlier run name a precision.
    :param stage: see `Finetuner`.
    :return: None if the run is complete already.
    """
    swaps = swaps_of_training(settings.flip, settings.flip_swap)
    initial = dataclasses.replace(
        initial, config=dataclasses.replace(initial.config, flip_swaps=swaps)
    )
    origin = origin_of(initial, settings, data, sources, use_fp16)
    interrupted = load_interrupted(settings, origin)
    files = interrupted["origin"].get("files") if interrupted else {}
    unknown = (
        f"{settings.last_path} is of an older version, which recorded the names of its images and"
        " of its checkpoint, but not their contents: these may have changed since"
    )
    if is_complete(interrupted, settings, len(data.train)):
        if files is None:
            say(unknown)
        return None
    _open_log(settings, interrupted["stepper"]["steps"] if interrupted else 0)
    began = precision_of_origin(interrupted["origin"]) if interrupted else ""
    precision, note = choose(settings.precision, use_fp16, began)
    settings = dataclasses.replace(settings, precision=precision)
    origin = dataclasses.replace(origin, settings=settings)
    notes = [note] if note else []
    if interrupted:
        origin, extended = origin.extended(interrupted)
        notes += extended
    for message in (*initial.messages, *notes):
        logger.log(message)
    if files is None:
        logger.log(unknown)
    log_data(data)
    if 0 < settings.microbatch < settings.batch_size and _has_batch_norm(initial.model):
        logger.log(f"BatchNorm sees --microbatch {settings.microbatch} images at a time")
    initial.model.to(dist_util.dev())
    if files:
        data = in_saved_order(data, files)
        origin = dataclasses.replace(origin, files=files)
    finetuner = Finetuner(initial, settings, data, origin, stage)
    if interrupted:
        finetuner.resume(interrupted)
        logger.log(f"resuming after epoch {finetuner.epoch}")
    return finetuner


def _has_batch_norm(model: th.nn.Module) -> bool:
    return any(isinstance(module, th.nn.BatchNorm2d) for module in model.modules())


def _open_log(settings: LearningConfig, step: int) -> None:
    also = ("wandb",) if settings.wandb else ()
    formats = ["tqdm", "log", "csv", "tensorboard"]
    logger.configure(settings.log_folder, formats, resume_step=step, also=also)


def log_data(data: TrainingData) -> None:
    """Log how many images there are, of which classes, and which classes no mask shows."""
    logger.log(f"{len(data.train)} training images, {len(data.val or ())} for validation")
    others = {
        "synthetic": data.synthetic,
        "unlabelled": data.unlabelled,
        "pseudo-labelled": data.pseudo,
    }
    for kind, images in others.items():
        if images is not None:
            logger.log(f"{len(images)} {kind} images")
    if data.shared:
        logger.log(data.shared)
    logger.log(describe_classes(data.categories))
    train = data.train if data.more is None else data.train.join(data.more)
    if absent := _absent(train, data.categories):
        logger.log(f"absent from all training masks, so cannot be learnt: {absent}")
    if lacking := _lacking(data.train, data.categories):
        logger.log(
            f"classes missing from some masks: {lacking}. If they can be seen there, complete the"
            " masks or pass --absent_classes unknown"
        )
    if data.val and (absent := _absent(data.val, data.categories)):
        logger.log(f"absent from all validation masks, so not in the mean scores: {absent}")


def _absent(images: LabelledImages, categories: Sequence[Category]) -> str:
    """The names of the classes that no mask shows."""
    pixels = images.class_pixels(len(categories))
    return ", ".join(c.name for c in categories if not pixels[c.index])


def _lacking(images: LabelledImages, categories: Sequence[Category]) -> str:
    """The classes that at least half of the masks show, but not all, and which masks lack them."""
    shown = [set(np.unique(mask).tolist()) for mask in images.masks]
    found = []
    for category in categories:
        names = [n for n, values in zip(images.names, shown) if category.index not in values]
        if category.index and 0 < len(names) <= len(shown) / 2:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            found.append(f"{category.name} (from {some})")
    return "; ".join(found)


def describe_classes(categories: Sequence[Category]) -> str:
    """The class table in a line of the log."""
    return f"{len(categories)} classes: {', '.join(f'{c.index} {c.name}' for c in categories)}"


def require_one_process() -> None:
    """:raises UserError: if a launcher started several."""
    dist_util.setup_dist()
    if dist_util.world_size() > 1:
        raise UserError(
            "training on a few images uses one process: run the command without a launcher"
        )


def train(run: TrainingRun | None) -> int:
    """Train and report the outcome.

    :param run: None for one that is complete.
    :return: the command's exit code.
    """
    if run is None:
        print("this run is complete: nothing to do")
        return 0
    run.run()
    if run.stopped_by:
        logger.log(f"stopped by {run.stopped_by}: rerun the command to resume")
        return EXIT_STOPPED
    logger.result(run.outcome())
    return 0
