"""From flags to a training run: what every diffusion trainer's script shares."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

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
from guided_diffusion.images.files import list_images
from guided_diffusion.images.image_io import check_header
from guided_diffusion.images.reading import ReadingConfig, low_contrast_advice
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig, check_flags
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime import checkpoint, rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import is_local
from guided_diffusion.runtime.flags import flag, from_flags, from_mapping
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.stepper import PRECISIONS
from guided_diffusion.train_util import Start, TrainLoop, find_start
from guided_diffusion.unet import ConditionalUNetModel


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training."""

    TITLE = "Training"

    data_dir: str = flag("", "folder of the images, searched recursively; or a glob")
    schedule_sampler: str = flag("uniform", "timesteps: uniform or loss-second-moment")
    lr: float = flag(1e-4, "learning rate of AdamW")
    weight_decay: float = flag(0.0, "decoupled weight decay of AdamW")
    lr_anneal_steps: int = flag(0, "learning rate falls to 0 over these steps; 0: constant")
    batch_size: int = flag(1, "images a rank and step")
    global_batch_size: int = flag(0, "images a step over all ranks, instead of batch_size")
    microbatch: int = flag(-1, "images a forward pass, to save memory; -1: the whole batch")
    ema_rate: str = flag("0.9999", "rates of the averaged weights, separated by commas")
    ema_warmup: bool = flag(True, "lower rates at the start: min(rate, (1+n)/(10+n)) at step n")
    log_interval: int = flag(10, "steps between rows of the log")
    save_interval: int = flag(10000, "steps between checkpoints")
    save_initial: bool = flag(False, "also save the random weights at step 0")
    keep_checkpoints: int = flag(0, "newest checkpoints to keep; 0: all")
    sample_interval: int = flag(10000, "steps between grids of samples; 0: none")
    resume_checkpoint: str = flag("", "auto or '': newest of the run's folder; none; or a file")
    fp16_scale_growth: float = flag(1e-3, "growth of log2 of the float16 loss scale a step")
    precision: str = flag("", "fp32, fp16 or bf16; '': as use_fp16 says", choices=("", *PRECISIONS))
    max_steps: int = flag(0, "steps after which training ends; 0: lr_anneal_steps, or never")
    max_grad_norm: float = flag(1.0, "2-norm to which longer gradients are cut; 0: never")
    max_skipped_steps: int = flag(100, "not finite gradients in a row that end the run; 0: never")
    seed: int = flag(0, "of weights, order, timesteps and noise")
    random_flip: bool = flag(False, "mirror half the images; left becomes right")
    random_crop: bool = flag(False, "crop 80 to 100 % of the image at a random place")
    num_workers: int = flag(-1, "processes a rank that read images; -1: by cores, 0 on the CPU")
    cache: str = flag("auto", "keep decoded images in memory", choices=("auto", "ram", "none"))
    skip_bad_images: bool = flag(False, "go on without images that cannot be read, listing them")
    compile: bool = flag(False, "compile the network: minutes at the start, faster steps on GPUs")
    wandb: bool = flag(False, "also log to Weights & Biases, which must be installed (pip)")


@dataclasses.dataclass(frozen=True)
class ConditionalTrainConfig(TrainConfig):
    """Training."""

    init_checkpoint: str = flag(
        "", "network without condition to begin from, model*.pt or ema_*.pt; '': random weights"
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run about to start: its folder, where it goes on, its configurations."""

    folder: str
    start: Start
    model: ModelConfig
    diffusion: DiffusionConfig
    reading: ReadingConfig
    train: TrainConfig
    classes: tuple[str, ...] = ()  # names in the order of their labels; () without labels
    init: Trained | None = None  # the network without condition to begin from

    def build(self, at: int = 0) -> th.nn.Module:
        """The network, on its device, with the weights that it begins from.

        :param at: see ConditionalUNetModel.load_widened.
        """
        network = self.model.build()
        if self.init is not None:
            widen(network, self.init, at)
        return network.to(dist_util.dev())

    def batches(self, start_step: int, **more: Any) -> Iterator[Batch]:
        """The training batches from a step on: images and, where the network asks, classes.

        :param more: further arguments of `load_data`.
        """
        batches = load_data(**self.loader_arguments(), **more, start_step=start_step)
        if not self.model.cond_drop_prob:
            return batches
        return drop_classes(
            batches, self.model.cond_drop_prob, self.model.num_classes, self.train.seed, start_step
        )

    def some_classes(self, count: int) -> dict[str, th.Tensor]:
        """The network's arguments for `count` images, of one class after the other."""
        if not self.classes:
            return {}
        return {"y": th.arange(count, device=dist_util.dev()) % len(self.classes)}

    def loader_arguments(self) -> dict[str, Any]:
        """The arguments of `load_data` that are the same for every trainer."""
        train = self.train
        workers = train.num_workers
        if workers < 0:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            workers = min(8, cores - 1) if dist_util.dev().type == "cuda" else 0
        return {
            "data_dir": train.data_dir,
            "batch_size": train.batch_size,
            "image_size": self.reading.image_size,
            "class_cond": self.model.class_cond,
            "classes": self.classes or None,
            "random_crop": train.random_crop,
            "random_flip": train.random_flip,
            "seed": train.seed,
            "num_workers": workers,
            "reading": self.reading,
            "cache": train.cache,
            "rank": dist_util.rank(),
            "num_ranks": dist_util.world_size(),
            "skip_bad_images": train.skip_bad_images,
            "on_skip": lambda line: logger.log(f"skipped: {line}"),
        }

    def loop_arguments(self) -> dict[str, Any]:
        """The arguments of TrainLoop that are the same for every trainer."""
        names = [
            "batch_size",
            "microbatch",
            "lr",
            "ema_rate",
            "log_interval",
            "save_interval",
            "fp16_scale_growth",
            "weight_decay",
            "lr_anneal_steps",
            "seed",
            "max_steps",
            "max_grad_norm",
            "compile",
            "ema_warmup",
            "keep_checkpoints",
            "max_skipped_steps",
            "save_initial",
            "sample_interval",
        ]
        return {
            **{name: getattr(self.train, name) for name in names},
            "precision": precision_of(self.train.precision, self.model.use_fp16),
            "resume_checkpoint": self.start,
            "progress": True,
        }


def precision_of(precision: str, use_fp16: bool) -> str:
    """The precision that the two flags mean; float16 on a CPU becomes float32, and says so."""
    chosen = precision or ("fp16" if use_fp16 else "fp32")
    if chosen == "fp16" and dist_util.dev().type != "cuda":
        logger.log("float16 needs CUDA: on the CPU this runs in float32")
        return "fp32"
    return chosen


def run_folder() -> str:
    """OPENAI_LOGDIR, or `runs/<date>-<time>` under the current folder; the same on all ranks."""
    folder = os.environ.get("OPENAI_LOGDIR") or datetime.now().strftime("runs/%Y%m%d-%H%M%S")
    return dist_util.broadcast_object(os.path.expanduser(folder))


def open_run(
    overrides: Mapping[str, Any],
    kind: str = "diffusion",
    model_type: type = ModelConfig,
    train_type: type[TrainConfig] = TrainConfig,
    reading: ReadingConfig | None = None,
    repeats: bool = False,
    folder: str = "",
) -> Run:
    """Check flags against data and run folder, open the log, write `config.json`.

    With --init_checkpoint the network is that one's where the flags do not say otherwise.

    :param overrides: the given flags.
    :param kind: of the network, for config.json.
    :param model_type: the configuration of such networks.
    :param train_type: the configuration of their training.
    :param reading: how images are read where the flags do not say; of a network to begin from
        only the way of resizing is not kept.
    :param repeats: a step may take an image several times.
    :param folder: of the run; by default as `run_folder` says.
    :raises UserError: for whatever the user must mend before anything is written.
    """
    train = from_flags(train_type, overrides)
    if not train.data_dir:
        raise UserError("--data_dir is missing: name the folder of the images")
    train = with_global_batch(train)
    for name in ("batch_size", "log_interval", "save_interval"):
        if getattr(train, name) < 1:
            raise UserError(f"--{name} {getattr(train, name)}: must be at least 1")
    folder = folder or run_folder()
    stored = checkpoint.read_config(folder)
    start = find_start(folder, train.resume_checkpoint)
    if stored is None and start.path:
        stored = checkpoint.read_config(start.path)
    paths = list_images(train.data_dir)
    init = None
    if isinstance(train, ConditionalTrainConfig) and train.init_checkpoint and not start.path:
        init = _read_init(train.init_checkpoint, overrides)
    note = ""
    if stored is not None and start.path:
        source = f"the run that {start.path} is of"
        if stored["kind"] != kind:
            raise UserError(
                f"{source} trains a network of the kind {stored['kind']}, not {kind}: set"
                " OPENAI_LOGDIR to another folder"
            )
        bases = {
            "model": from_mapping(model_type, stored["model"]),
            "diffusion": from_mapping(DiffusionConfig, stored["diffusion"]),
            "reading": ReadingConfig.from_dict(stored["reading"]),
        }
        for base in bases.values():
            free = ("dropout", "use_checkpoint", "use_fp16", "timestep_respacing")
            check_flags(overrides, base, source, free)
    elif init is not None:
        bases = {
            # a condition takes the place of the classes
            "model": from_flags(model_type, {"class_cond": False, "cond_drop_prob": 0}, init.model),
            "diffusion": init.diffusion,
            "reading": dataclasses.replace(
                init.reading, **({"resize": reading.resize} if reading else {})
            ),
        }
    else:
        defaults = {}
        if "in_channels" not in overrides:
            grey = dist_util.broadcast_object(
                sample_is_grey(paths) if dist_util.is_main() else None
            )
            defaults["in_channels"] = 1 if grey else 3
            note = (
                "a sample of the images is all grey: in_channels 1"
                if grey
                else "a sample of the images is not all grey: in_channels 3"
            )
        bases = {
            "model": model_type(**defaults),
            "diffusion": DiffusionConfig(),
            "reading": reading or ReadingConfig(),
        }
    model = from_flags(model_type, overrides, bases["model"]).with_explicit_channel_mult()
    with th.device("meta"):
        model.build()  # refuses what makes no network, before anything is written
    classes = ()
    if model.class_cond:
        known = stored.get("classes", ()) if stored is not None and start.path else ()
        classes = _classes(train.data_dir, paths, model.num_classes, known)
    reading = from_flags(ReadingConfig, overrides, bases["reading"])
    reading = dataclasses.replace(
        reading, image_size=model.image_size, in_channels=model.in_channels
    )
    diffusion = from_flags(DiffusionConfig, overrides, bases["diffusion"])
    if not repeats and len(paths) < train.batch_size * dist_util.world_size():
        raise UserError(
            f"{train.data_dir} holds {len(paths)} images, fewer than the"
            f" {train.batch_size * dist_util.world_size()} of one step: lower --batch_size"
        )
    if dist_util.is_main() and not train.skip_bad_images:
        for path in paths:
            if is_local(path):
                check_header(path)
    also = ("wandb",) if train.wandb else ()
    logger.configure(folder, resume_step=start.step, comm=dist_util.Comm(), also=also)
    logger.log(f"{len(paths)} images in {train.data_dir}; run folder {folder}")
    for line in (note, low_contrast_advice(paths, reading) if dist_util.is_main() else None):
        if line:
            logger.log(line)
    if classes:
        logger.log(f"{len(classes)} classes: {_listing(classes)}")
    if dist_util.is_main():
        checkpoint.write_config(
            folder,
            {
                "kind": kind,
                "model": model,
                "diffusion": diffusion,
                "reading": reading.to_dict(),
                "classes": list(classes),
                "training": train,
            },
        )
    th.manual_seed(train.seed)
    return Run(folder, start, model, diffusion, reading, train, classes, init)


def _read_init(path: str, overrides: Mapping[str, Any]) -> Trained:
    """The network without condition to begin from.

    What its weights hold must be as the flags say; its output, process and classes may differ.
    """
    free = ("learn_sigma", "class_cond", "num_classes", "cond_drop_prob")
    if checkpoint.read_config(path) is not None:
        overrides = {
            f.name: overrides[f.name]
            for f in dataclasses.fields(ModelConfig)
            if f.name in overrides and f.name not in free
        }
    return read_trained(path, overrides)


def widen(network: ConditionalUNetModel, init: Trained, at: int = 0) -> None:
    """Give a network with condition the weights of one without, and log what became of them.

    :param at: see ConditionalUNetModel.load_widened.
    :raises UserError: if nothing fits.
    """
    try:
        report = network.load_widened(init.weights, at)
    except ValueError as error:
        raise UserError(f"--init_checkpoint {init.path}: {error}") from error
    logger.log(f"{init.path}: {report}; the input layer's other channels begin at zero")


def _classes(
    data_dir: str, paths: Sequence[str], most: int, known: Sequence[str]
) -> tuple[str, ...]:
    """The names of the classes; those of the run that goes on, where there is one."""
    names = class_names(paths)
    if len(names) > most:
        raise UserError(
            f"{data_dir} holds {len(names)} classes ({_listing(names)}), the network has"
            f" --num_classes {most}; the class is a file's name up to the first underscore"
        )
    if known:
        class_labels(paths, known)  # refuses a class that the run does not know
    return tuple(known or names)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def drop_classes(
    batches: Iterator[Batch], share: float, null: int, seed: int, start_step: int
) -> Iterator[Batch]:
    """Put the class `null`, "no class", in the place of a share of the classes.

    So one network learns to denoise with and without the class (arXiv 2207.12598, algorithm 1).
    Which images lose theirs is a function of the seed and of their number in the run.
    """
    ranks, rank = dist_util.world_size(), dist_util.rank()
    for step, (images, cond) in enumerate(batches, start_step):
        first = (step * ranks + rank) * len(images)
        draws = rng.uniforms(seed, "drop class", range(first, first + len(images)))
        dropped = th.from_numpy(draws < share)
        yield images, {**cond, "y": cond["y"].masked_fill(dropped, null)}


def run_training(loop: TrainLoop, run: Run) -> int:
    """Train to the end, or to a signal; returns the command's exit code."""
    loop.run_loop()
    if loop.stopped_by:
        logger.log(f"stopped by {loop.stopped_by}: the same command goes on from here")
    logger.log(f"run folder: {run.folder}")
    return EXIT_STOPPED if loop.stopped_by else 0


def with_global_batch(train: TrainConfig) -> TrainConfig:
    """`batch_size` a rank, from `global_batch_size` where that is given."""
    total, ranks = train.global_batch_size, dist_util.world_size()
    if not total:
        return train
    if total % ranks:
        raise UserError(f"--global_batch_size {total} cannot be shared out among {ranks} ranks")
    return dataclasses.replace(train, batch_size=total // ranks)


def grid_path(folder: str, step: int) -> str:
    return bf.join(folder, f"samples_{step:06d}.png")
