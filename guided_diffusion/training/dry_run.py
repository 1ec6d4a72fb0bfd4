"""What a long run would take: hours, memory, disk; nothing is written.

Its parts are run once and timed, each at its real size unless that takes more than a minute or
more memory than there is: then a smaller piece is timed and its time scaled by the operations, and
memory is counted on tensors without contents. `estimate.py` adds the parts up.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import Batch, class_names
from guided_diffusion.images.cache import free_memory
from guided_diffusion.images.files import list_radiographs, split_folder
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.record import NetworkRecord
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.storage.files import check_output
from guided_diffusion.runtime.storage.resume import Start
from guided_diffusion.training.adapting import read_init, record_of_init
from guided_diffusion.training.config import GuidedTrainConfig, PretrainConfig
from guided_diffusion.training.diffusion import diffusion_batches
from guided_diffusion.training.estimate import Costs, Estimate, Images, Memory, Schedule
from guided_diffusion.training.guidance import guided_batches
from guided_diffusion.training.pieces import Piece, Timing, pieces_of, time_largest
from guided_diffusion.training.reading_costs import (
    ReadingCosts,
    read_some,
    seconds_of_checking,
    seconds_of_checking_masks,
)
from guided_diffusion.training.run import (
    Run,
    apply_flags,
    infer_channels,
    precision_of,
    run_folder,
    with_global_batch,
)
from guided_diffusion.training.trial import (
    AnyRun,
    Clock,
    Trial,
    available_memory,
    held_memory,
    peak_memory,
)

GuidedRun = Run[GuidedConfig, GuidedTrainConfig]

# the longest that a microbatch and an evaluation of the network for samples may take here, seconds
_LONGEST_STEP, _LONGEST_SAMPLE = 45.0, 10.0
# timed calls of the optimizer
_OPTIMIZER_STEPS = 5
# a peak that is higher by this factor counts as higher
_MORE = 1.02


def dry_run(
    overrides: Overrides,
    model_type: type[ModelConfig] = ModelConfig,
    clock: Clock = time.perf_counter,
) -> Estimate:
    """Train on random images for some steps, read some of the real ones, and add up.

    :param overrides: the flags on the command line; without `data_dir` the images are taken to be
        grey, and reading them to take no time.
    :param model_type: the configuration of the network.
    :param clock: what counts seconds.
    :raises UserError: for flags that make no network, or no training with these images.
    """
    imported = time.process_time()
    began = clock()
    run, paths = _describe(overrides, model_type)
    check_output(run.folder, folder=True)
    available = available_memory()
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, _log_formats()):
        precision = precision_of(run.train.precision, run.model.use_fp16)
        run = replace(run, train=replace(run.train, precision=precision))
        if overrides.get("align_encoder"):
            logger.log("--align_encoder is left out: its first epoch takes longer")
        trial = Trial(run, clock)
        start = imported + clock() - began - trial.counting_seconds
        start += seconds_of_checking(paths, run.train, clock)
        if isinstance(run.train, GuidedTrainConfig):
            classes = cast(GuidedRun, run).model.num_segmentation_classes
            start += seconds_of_checking_masks(run.train, classes, clock)
        with read_some(run, paths, _batches(run), clock) as reading:
            return _estimate(trial, reading, start, available)


def _log_formats() -> list[str]:
    """Those of a run, since what they import takes memory."""
    return ["stderr", "log", "csv", "tensorboard"] if dist_util.is_main() else ["log"]


def _describe(overrides: Overrides, model_type: type[ModelConfig]) -> tuple[AnyRun, list[str]]:
    """The run that the flags describe, as `open_run` does, and its images; nothing is written."""
    guided = issubclass(model_type, GuidedConfig)
    for name in ("data_dir", "seg_dir") if guided else ():
        if overrides.get(name):
            overrides = {**overrides, name: split_folder(overrides[name], "train")}
    data_dir = overrides.get("data_dir")
    paths = list(list_radiographs(data_dir)[0]) if data_dir else []
    train = from_flags(GuidedTrainConfig if guided else PretrainConfig, overrides)
    if named := getattr(train, "init_checkpoint", ""):
        kind = "segmentation_guided" if guided else "diffusion"
        base = record_of_init(read_init(named, overrides, kind), model_type)
    else:
        base = NetworkRecord(model_type(), DiffusionConfig(), ReadingConfig())
        if "in_channels" not in overrides:
            overrides = {**overrides, "in_channels": infer_channels(paths) if paths else 1}
    record = apply_flags(base, model_type, overrides)
    run: AnyRun = Run(
        model=record.model,
        diffusion=record.diffusion,
        reading=record.reading,
        classes=tuple(class_names(paths)) if record.model.needs_classes else (),
        train=with_global_batch(train),
        folder=run_folder(overrides),
        start=Start(),
    )
    return run, paths


def _batches(run: AnyRun) -> Callable[[], Iterator[Batch]] | None:
    """The run's batches from its first step on; None without images."""
    if not run.train.data_dir:
        return None
    if isinstance(run.train, GuidedTrainConfig) and run.train.seg_dir:
        return functools.partial(guided_batches, cast(GuidedRun, run), 0)
    return functools.partial(diffusion_batches, run, 0)


def _estimate(trial: Trial, reading: ReadingCosts, start: float, available: int) -> Estimate:
    run, whole, grid = trial.run, trial.whole, trial.grid
    samples = bool(run.train.sample_interval)
    pieces = _pieces(whole, trial)
    # the optimizer's state takes memory from the first step on
    trial.train(pieces[0], exchange=True)
    trial.update()
    training = time_largest(
        pieces,
        trial.train,
        lambda piece: trial.operations(piece, backward=True),
        _LONGEST_STEP,
        lambda piece: trial.on_gpu or _fits(trial.counted(piece, pieces[0]).training),
    )
    optimizer = _optimizer_seconds(trial, pieces[0])
    exchange = _exchange_seconds(trial, pieces[0]) if trial.accumulates else 0.0
    peak, held = peak_memory(), held_memory()
    evaluation = Timing(grid, 0.0, 0.0)
    if samples:
        evaluation = time_largest(
            _pieces(grid, trial),
            trial.sample,
            lambda piece: trial.operations(piece, backward=False),
            _LONGEST_SAMPLE,
            lambda piece: trial.on_gpu or _fits(trial.counted(pieces[0], piece).sampling),
        )
    checkpoint_bytes, saving = trial.save()
    at_training, at_sampling, counted = _peaks(trial, training.piece, evaluation.piece, peak, held)
    sampling = samples and at_sampling > _MORE * at_training
    more = 0 if trial.on_gpu else reading.unread_bytes - trial.counting_bytes
    memory = Memory(
        (at_sampling if sampling else at_training) + more,
        available,
        "GPU" if trial.on_gpu else "CPU",
        sampling,
        counted,
        cache=0 if trial.on_gpu else reading.cache_bytes,
    )
    if run.train.compile:
        start += training.first - training.seconds + evaluation.first - evaluation.seconds
    images = Images(
        per_rank=run.train.batch_size,
        microbatch=whole.images,
        ranks=dist_util.world_size(),
        total=reading.images,
        cached=reading.cache_bytes > 0,
        workers=reading.workers,
    )
    costs = Costs(
        start=start,
        microbatch=_scaled(trial, training, whole, backward=True),
        optimizer=optimizer,
        reading=reading.seconds,
        checkpoint=saving,
        grid=trial.evaluations() * _scaled(trial, evaluation, grid, backward=False),
        checkpoint_bytes=checkpoint_bytes,
        grid_bytes=trial.grid_bytes(),
        exchange=exchange,
        worker_bytes=reading.worker_bytes,
    )
    operations = trial.operations(whole, backward=True) * images.per_step / whole.images
    return Estimate(
        parameters=sum(p.numel() for p in trial.loop.model.parameters()),
        operations=round(operations),
        memory=memory,
        schedule=Schedule(run.train, images, costs),
        timed=_timed(training.piece, whole),
    )


def _pieces(whole: Piece, trial: Trial) -> list[Piece]:
    # every size would be compiled anew
    return [whole] if trial.run.train.compile else pieces_of(whole, trial.multiple)


def _fits(needed: int) -> bool:
    """Whether every rank has that much memory left, bytes. On CUDA, running out of it tells."""
    return not dist_util.agree_max(int(needed > free_memory()))


def _scaled(trial: Trial, timing: Timing, whole: Piece, backward: bool) -> float:
    """Seconds for the whole, by the operations in it and in the piece that was timed."""
    if timing.piece == whole:
        return timing.seconds
    ratio = trial.operations(whole, backward) / trial.operations(timing.piece, backward)
    return timing.seconds * ratio


def _optimizer_seconds(trial: Trial, piece: Piece) -> float:
    found = []
    for _ in range(_OPTIMIZER_STEPS):
        trial.train(piece)
        found.append(trial.update())
    return statistics.median(found)


def _exchange_seconds(trial: Trial, piece: Piece) -> float:
    """Seconds that exchanging gradients adds to a backward pass."""
    if dist_util.world_size() == 1:
        return 0.0
    with_it, without = (
        statistics.median(trial.train(piece, exchange) for _ in range(_OPTIMIZER_STEPS))
        for exchange in (True, False)
    )
    return max(0.0, with_it - without)


def _peaks(
    trial: Trial, trained: Piece, sampled: Piece, peak: int, held: int
) -> tuple[int, int, bool]:
    """The peaks of training and of sampling, bytes, and whether they were counted.

    :param peak: of training with the piece `trained`; :param held: after it.
    """
    if (trained, sampled) == (trial.whole, trial.grid):
        return peak, peak_memory(), False
    whole, done = trial.counted(trial.whole, trial.grid), trial.counted(trained, sampled)
    held += whole.kept - done.kept
    return peak + whole.training - done.training, held + whole.sampling - whole.kept, True


def _timed(piece: Piece, whole: Piece) -> str:
    if piece == whole:
        return ""
    parts = [f"{p.images} at {p.side}x{p.side} pixels" for p in (piece, whole)]
    return f"timed with a microbatch of {parts[0]}, scaled by operations to {parts[1]}"
