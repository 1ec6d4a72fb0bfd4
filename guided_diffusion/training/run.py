"""From flags to a training run: what every diffusion trainer's script shares."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar, cast

import blobfile as bf
import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import (
    Batch,
    class_labels,
    class_names,
    load_data,
    sample_is_grey,
)
from guided_diffusion.images.files import list_radiographs
from guided_diffusion.images.image_io import check_images
from guided_diffusion.images.reading import ReadingConfig, low_contrast_advice
from guided_diffusion.networks.config import (
    FREE_FLAGS,
    DiffusionConfig,
    ModelConfig,
    NetworkConfig,
    check_flags,
)
from guided_diffusion.networks.precision import choose
from guided_diffusion.networks.record import NetworkRecord, read_record
from guided_diffusion.networks.trained import Trained
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.command_line.precision_flag import AUTO
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.runtime.storage import checkpoint, run_lock
from guided_diffusion.runtime.storage.contents import Files
from guided_diffusion.runtime.storage.files import check_output, expand_path, is_local
from guided_diffusion.runtime.storage.resume import Start
from guided_diffusion.train_util import TrainLoop, find_start
from guided_diffusion.training.adapting import adapt, read_init, record_of_init, widen
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.history import Contents, training_sections
from guided_diffusion.training.unnamed import DATED, notes_on
from guided_diffusion.unet import ConditionalUNetModel

Network = TypeVar("Network", bound=NetworkConfig)
Network_co = TypeVar("Network_co", bound=NetworkConfig, covariant=True)
Train = TypeVar("Train", bound=TrainConfig)
Train_co = TypeVar("Train_co", bound=TrainConfig, covariant=True)
Loop = TypeVar("Loop", bound=TrainLoop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(NetworkRecord[Network_co], Generic[Network_co, Train_co]):
    """A run about to start: its network and process, its settings, its folder and first step.

    init: the trained network to start from, if any.
    """

    train: Train_co
    folder: str
    start: Start
    init: Trained | None = None

    def build(self, at: int = 0) -> th.nn.Module:
        """The network on its device, with the weights of `init`, if any.

        :param at: see ConditionalUNetModel.load_widened.
        """
        network = self.model.build()
        if self.init is not None and isinstance(network, ConditionalUNetModel):
            widen(network, self.init, at)
        elif self.init is not None:
            adapt(network, self.init, cast(NetworkRecord[ModelConfig], self))
        return network.to(dist_util.dev())

    def batches(self, start_step: int, data_dir: str = "", **more: Any) -> Iterator[Batch]:
        """Batches from a step on: images and, where the network needs them, classes.

        :param data_dir: other images than those of the training.
        :param more: further arguments of `load_data`.
        """
        train = self.train
        return load_data(
            data_dir=data_dir or train.data_dir,
            batch_size=train.batch_size,
            image_size=self.reading.image_size,
            class_cond=self.model.needs_classes,
            classes=self.classes or None,
            random_crop=train.random_crop,
            random_flip=train.random_flip,
            seed=train.seed,
            num_workers=num_workers_of(train.num_workers),
            reading=self.reading,
            cache=train.cache,
            rank=dist_util.rank(),
            num_ranks=dist_util.world_size(),
            skip_bad_images=train.skip_bad_images,
            on_skip=lambda line: logger.log(f"skipped: {line}"),
            start_step=start_step,
            **more,
        )

    def loop(
        self,
        loop_type: type[Loop],
        network: th.nn.Module,
        batches: Callable[[int], Iterator[Batch]],
        sample_fn: Callable[[th.nn.Module, int], None] | None = None,
        **more: Any,
    ) -> Loop:
        """The training loop.

        :param batches: from a step to the batches from that step on.
        :param sample_fn: see TrainLoop.
        :param more: further arguments of `loop_type`.
        """
        process = self.diffusion.build()
        return loop_type(
            model=network,
            diffusion=process,
            data=batches,
            settings=self.train,
            folder=self.folder,
            start=self.start,
            schedule_sampler=create_named_schedule_sampler(self.train.schedule_sampler, process),
            sample_fn=sample_fn,
            progress=True,
            **more,
        )


def num_workers_of(wanted: int) -> int:
    if wanted >= 0:
        return wanted
    return min(8, dist_util.cores() - 1) if dist_util.dev().type == "cuda" else 0


def precision_of(precision: str, use_fp16: bool) -> str:
    """The precision in which a new training with these flags computes; the log says why.

    Collective. float16 on a CPU becomes float32.
    """
    chosen, note = choose(precision, use_fp16)
    if note:
        logger.log(note)
    return "fp32" if chosen == "fp16" and dist_util.dev().type != "cuda" else chosen


def run_folder(overrides: Overrides) -> str:
    """--output, or OPENAI_LOGDIR, or `runs/<date>-<time>` under the current folder; the same on all
    ranks."""
    given, variable = overrides.get("output", ""), os.environ.get("OPENAI_LOGDIR", "")
    folder = given or variable or datetime.now().strftime(f"runs/{DATED}")
    return dist_util.broadcast_object(expand_path(folder))


def overruled(overrides: Overrides) -> str:
    """A line for the log if --output differs from OPENAI_LOGDIR, else ""."""
    given, variable = overrides.get("output", ""), os.environ.get("OPENAI_LOGDIR", "")
    if not (given and variable) or os.path.abspath(given) == os.path.abspath(expand_path(variable)):
        return ""
    return f"--output {given} is used, not OPENAI_LOGDIR, which is {variable}"


def open_run(
    overrides: Overrides,
    kind: str,
    model_type: type[Network],
    train_type: type[Train],
    *,
    reading: ReadingConfig | None = None,
    repeats: bool = False,
    folder: str = "",
    files: Files | None = None,
    pairs: Sequence[tuple[str, str]] = (),
) -> Run[Network, Train]:
    """Check flags against data and run folder, open the log, write `config.json`.

    What the flags leave open is taken from the run that is resumed, from --init_checkpoint, or
    from the defaults, in this order.

    :param overrides: the flags on the command line.
    :param kind: of the network; see `trained.KINDS`.
    :param model_type: the configuration of such networks.
    :param train_type: the configuration of their training.
    :param reading: default reading of images; with --init_checkpoint only its `resize` counts, in
        place of a crop.
    :param repeats: whether a step may use an image several times.
    :param folder: of the run; by default `run_folder`.
    :param files: contents of a few labelled images; the run then refuses others.
    :param pairs: each image with its mask, where there are masks.
    :raises UserError: for everything that the user must fix before anything is written.
    """
    train = check_training_flags(train_type, overrides)
    instead = "choose another --weights_save" if folder else "name another folder with --output"
    named_by_user = folder or overrides.get("output") or os.environ.get("OPENAI_LOGDIR")
    folder = folder or run_folder(overrides)
    check_output(folder, folder=True)
    if dist_util.is_main():
        run_lock.hold_folder(folder, instead)
    start = find_start(folder, train.resume_checkpoint)
    paths, left_out = [image for image, _ in pairs], ""
    if not pairs:
        paths, left_out = list_radiographs(train.data_dir)
    init = None
    if (named := getattr(train, "init_checkpoint", "")) and not start.path:
        init = read_init(named, overrides, kind)
    stored = _stored_sections(folder, start)
    notes = [f"{len(paths)} images in {train.data_dir}; run folder {folder}"]
    notes += filter(None, (overruled(overrides), left_out))
    if stored is not None:
        base = _record_of_resumed_run(stored, start, kind, model_type, overrides)
    elif init is not None:
        base = record_of_init(init, model_type, reading)
        notes += _advice_for_grey(base.reading, paths, overrides)
    else:
        base = NetworkRecord(model_type(), DiffusionConfig(), reading or ReadingConfig())
        if "in_channels" not in overrides:
            channels = infer_channels(paths)
            overrides = {**overrides, "in_channels": channels}
            grey = "all grey" if channels == 1 else "not all grey"
            notes.append(f"a sample of the images is {grey}: in_channels {channels}")
    record = apply_flags(base, model_type, overrides)
    began = ""
    if start.path:
        began, stored = _precision_of_resumed_run(stored, base.model.use_fp16)
    changed = record.model.use_fp16 != base.model.use_fp16
    precision, note = choose(train.precision, record.model.use_fp16, began, changed)
    train = dataclasses.replace(train, precision=precision)
    notes += [note] if note else []
    if record.model.needs_classes:
        classes = _find_classes(train.data_dir, paths, record.model.num_classes, base.classes)
        record = dataclasses.replace(record, classes=classes)
        notes.append(f"{len(classes)} classes: {_listing(classes)}")
    _check_images(train, paths, repeats)
    config: dict[str, Any] = {}
    if dist_util.is_main():
        if advice := low_contrast_advice(paths, record.reading):
            notes.append(advice)
        groups: Sequence[Sequence[str]] = pairs or [[path] for path in paths]
        labels = class_labels(paths, record.classes) if record.classes else ()
        data = Contents.of(train.data_dir, groups, files, labels)
        own = stored if bf.dirname(start.path) == bf.dirname(bf.join(folder, "model.pt")) else None
        config, said = training_sections(train, data, start, own, folder, dist_util.world_size())
        notes += said
        if not named_by_user:
            notes[1:1] = notes_on(folder, record, kind, config)

    also = ("wandb",) if train.wandb else ()
    logger.configure(folder, resume_step=start.step, comm=dist_util.Comm(), also=also)
    for note in notes:
        logger.log(note)
    if dist_util.is_main():
        checkpoint.write_config(folder, {**record.sections(kind), **config})
    th.manual_seed(train.seed)
    return Run(**vars(record), train=train, folder=folder, start=start, init=init)


def check_training_flags(train_type: type[Train], overrides: Overrides) -> Train:
    """The settings of the training, with the batch size per rank.

    :raises UserError: for flags that do not make a training.
    """
    train = from_flags(train_type, overrides)
    if not train.data_dir:
        raise UserError("--data_dir is missing: name the folder of the images")
    named = getattr(train, "init_checkpoint", "") and train.resume_checkpoint
    if named not in ("", "auto", "none"):
        raise UserError(
            f"--resume_checkpoint {named} goes on with a run, --init_checkpoint begins another one:"
            " omit one of them"
        )
    return with_global_batch(train)


def with_global_batch(train: Train) -> Train:
    """With the `batch_size` per rank that `global_batch_size`, if set, amounts to."""
    total, ranks = train.global_batch_size, dist_util.world_size()
    if not total:
        return train
    if total % ranks:
        raise UserError(f"--global_batch_size {total} is not divisible by {ranks} ranks")
    return dataclasses.replace(train, batch_size=total // ranks)


def _advice_for_grey(
    reading: ReadingConfig, paths: Sequence[str], overrides: Overrides
) -> list[str]:
    """A line for the log where a network for colour begins to learn from grey images."""
    if reading.in_channels == 1 or "in_channels" in overrides or infer_channels(paths) == 3:
        return []
    return ["a sample of the images is all grey: --in_channels 1 would adapt the network to them"]


def infer_channels(paths: Sequence[str]) -> int:
    """1 if a sample of the images is all grey, otherwise 3. Collective."""
    grey = dist_util.broadcast_object(sample_is_grey(list(paths)) if dist_util.is_main() else None)
    return 1 if grey else 3


def _stored_sections(folder: str, start: Start) -> dict[str, Any] | None:
    """The config.json of the run that is resumed; None without one."""
    if not start.path:
        return None
    stored = checkpoint.read_config(folder)
    return checkpoint.read_config(start.path) if stored is None else stored


def _record_of_resumed_run(
    stored: Mapping[str, Any],
    start: Start,
    kind: str,
    model_type: type[Network],
    overrides: Overrides,
) -> NetworkRecord[Network]:
    """:raises UserError: if flags contradict the run."""
    source = f"the run of {start.path}"
    if stored["kind"] != kind:
        raise UserError(
            f"{source} trains a network of the kind {stored['kind']}, not {kind}: name"
            " another folder with --output"
        )
    record = read_record(stored, model_type)
    try:
        for config in (record.model, record.diffusion, record.reading):
            check_flags(overrides, config, source, FREE_FLAGS)
    except UserError as error:
        if kind != "diffusion" or overrides.get("resume_checkpoint") != start.path:
            raise
        raise UserError(
            f"{error}; or begin a new run from its weights: --init_checkpoint {start.path} in place"
            " of --resume_checkpoint"
        ) from error
    return record


def _precision_of_resumed_run(
    stored: dict[str, Any] | None, use_fp16: bool
) -> tuple[str, dict[str, Any] | None]:
    """The precision in which a run began, and its config.json with that in it.

    Older versions and the original package recorded none: their runs are float32, or float16 with
    use_fp16.
    """
    training = (stored or {}).get("training", {})
    began = training.get("precision", "")
    if began in AUTO:
        began = "fp16" if use_fp16 else "fp32"
    return began, stored and {**stored, "training": {**training, "precision": began}}


def apply_flags(
    base: NetworkRecord[Network], model_type: type[Network], overrides: Overrides
) -> NetworkRecord[Network]:
    """:raises UserError: for what makes no network, before anything is written."""
    model = from_flags(model_type, overrides, base.model).with_explicit_channel_mult()
    with th.device("meta"):
        model.build()
    reading = from_flags(ReadingConfig, overrides, base.reading)
    reading = dataclasses.replace(
        reading, image_size=model.image_size, in_channels=model.in_channels
    )
    return NetworkRecord(model, from_flags(DiffusionConfig, overrides, base.diffusion), reading)


def _find_classes(
    data_dir: str, paths: Sequence[str], num_classes: int, known: Sequence[str]
) -> tuple[str, ...]:
    """The names of the classes; those of the run that is resumed, where there is one."""
    names = class_names(paths)
    if len(names) > num_classes:
        raise UserError(
            f"{data_dir} holds {len(names)} classes ({_listing(names)}), the network has"
            f" --num_classes {num_classes}; the class is a file's name up to the first underscore"
        )
    if known:
        class_labels(paths, known)  # refuses a class that the run does not know
    return tuple(known or names)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _check_images(train: TrainConfig, paths: Sequence[str], repeats: bool) -> None:
    """:raises UserError: for too few images, or a local one without a readable header."""
    per_step = train.batch_size * dist_util.world_size()
    if not repeats and len(paths) < per_step:
        raise UserError(
            f"{train.data_dir} holds {len(paths)} images, fewer than the {per_step} of one step:"
            " lower --batch_size"
        )
    if dist_util.is_main() and not train.skip_bad_images:
        check_images([path for path in paths if is_local(path)])


def run_training(loop: TrainLoop, run: Run[NetworkConfig, TrainConfig]) -> int:
    """Train to the end, or until a signal; returns the command's exit code."""
    loop.run_loop()
    if loop.stopped_by:
        logger.log(f"stopped by {loop.stopped_by}: rerun the command to resume")
    logger.result(f"run folder: {run.folder}")
    return EXIT_STOPPED if loop.stopped_by else 0


def grid_path(folder: str, step: int) -> str:
    """Where the grid of samples of a step is written."""
    return bf.join(folder, f"samples_{step:06d}.png")
