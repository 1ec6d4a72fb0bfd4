"""What a training run takes, added up from what its parts take."""

from dataclasses import dataclass

from guided_diffusion.runtime.command_line.loop_config import LoopConfig

GIB = 2**30


@dataclass(frozen=True)
class Costs:
    """What the parts of a run take, in seconds and bytes.

    start: until the first step. microbatch: its forward and backward pass. optimizer: what
    follows once per step. reading: of one batch from files, with all data loader processes
    together; None where the flags name no images. checkpoint: saving all its files. grid: a grid
    of samples. exchange: of gradients between ranks, once per step. worker_bytes: of all data
    loader processes together, beyond what they share.
    """

    start: float
    microbatch: float
    optimizer: float
    reading: float | None
    checkpoint: float
    grid: float
    checkpoint_bytes: int
    grid_bytes: int
    exchange: float = 0.0
    worker_bytes: int = 0


@dataclass(frozen=True)
class Images:
    """The images of a run.

    per_rank: in a step of one rank. ranks: their number. total: in the folder, 0 where the flags
    name none. cached: whether each is read from its file only once. workers: data loader
    processes per rank.
    """

    per_rank: int
    microbatch: int
    ranks: int = 1
    total: int = 0
    cached: bool = False
    workers: int = 0

    @property
    def per_step(self) -> int:
        return self.per_rank * self.ranks


@dataclass(frozen=True)
class Part:
    """A part of a run: its name, how many there are, and seconds for all of them."""

    name: str
    count: int
    seconds: float


class Schedule:
    """When a run does what, and what that adds up to."""

    def __init__(self, settings: LoopConfig, images: Images, costs: Costs, grids: bool = True):
        self.settings, self.images, self.costs = settings, images, costs
        self.steps = settings.max_steps or settings.lr_anneal_steps
        self.sample_interval = settings.sample_interval if grids else 0

    @property
    def computing(self) -> float:
        """Seconds that a step computes."""
        costs, images = self.costs, self.images
        microbatches = images.per_rank / images.microbatch
        return microbatches * costs.microbatch + costs.exchange + costs.optimizer

    @property
    def waiting(self) -> float:
        """Seconds that a step waits for images which are read from their files."""
        if self.costs.reading is None:
            return 0.0
        busy = self.computing if self.images.workers else 0.0
        return max(0.0, self.costs.reading - busy)

    @property
    def per_step(self) -> float:
        """Seconds per step, once images that stay in memory are there."""
        return self.computing + (0.0 if self.images.cached else self.waiting)

    @property
    def per_step_with_all(self) -> float:
        """Seconds per step with its share of checkpoints and grids, in a run without an end."""
        extra = self.costs.checkpoint / self.settings.save_interval
        between = self.saves_between(self.settings.save_interval)
        extra += between * self.costs.checkpoint / self.settings.save_interval
        if self.sample_interval:
            extra += self.costs.grid / self.sample_interval
        return self.per_step + extra

    def saves_between(self, steps: int) -> int:
        """Checkpoints by `save_minutes` in the steps between two of `save_interval`."""
        minutes = self.settings.save_minutes
        return int(steps * self.per_step / (60 * minutes)) if minutes else 0

    def parts(self) -> list[Part]:
        """The parts of a run that ends, in the order in which they begin."""
        costs, steps = self.costs, self.steps
        parts = [Part("starting", 1, costs.start)]
        if self.images.cached and self.waiting:
            read = min(steps, -(-self.images.total // self.images.per_step))
            count = min(self.images.total, steps * self.images.per_step)
            parts.append(Part("reading images once", count, read * self.waiting))
        parts.append(Part("steps", steps, steps * self.per_step))
        saved, interval = self.checkpoints(), self.settings.save_interval
        saved += steps // interval * self.saves_between(interval)
        saved += self.saves_between(steps % interval)
        parts.append(Part("checkpoints", saved, saved * costs.checkpoint))
        if self.sample_interval and (drawn := steps // self.sample_interval):
            parts.append(Part("sample grids", drawn, drawn * costs.grid))
        return parts

    def checkpoints(self) -> int:
        """The checkpoints that a run which ends saves."""
        interval = self.settings.save_interval
        last = self.steps % interval > 0
        return self.steps // interval + last + self.settings.save_initial

    def seconds(self) -> float:
        """All seconds of a run that ends."""
        return sum(part.seconds for part in self.parts())

    def kept_bytes(self) -> int:
        """Bytes on the disk at the end of a run that ends."""
        saved, keep = self.checkpoints(), self.settings.keep_checkpoints
        kept = min(keep, saved) if keep else saved
        drawn = self.steps // self.sample_interval if self.sample_interval else 0
        return kept * self.costs.checkpoint_bytes + drawn * self.costs.grid_bytes

    def most_bytes(self) -> int:
        """Bytes on the disk at most: a checkpoint is removed when the next is complete."""
        removes = 0 < self.settings.keep_checkpoints < self.checkpoints()
        removes |= self.saves_between(min(self.steps, self.settings.save_interval)) > 0
        return self.kept_bytes() + (self.costs.checkpoint_bytes if removes else 0)

    def bytes_per_day(self) -> float:
        """What the files of a run without an end grow by."""
        steps = 86400 / self.per_step_with_all
        saved = 0.0
        if not self.settings.keep_checkpoints:
            saved = self.costs.checkpoint_bytes / self.settings.save_interval
        drawn = self.costs.grid_bytes / self.sample_interval if self.sample_interval else 0.0
        return steps * (saved + drawn)


@dataclass(frozen=True)
class Memory:
    """Memory of one rank, bytes.

    peak: of the process on a CPU, of PyTorch's allocator on CUDA. available: what there is for
    it. sampling: whether a grid of samples, not a step, needs most. counted: whether the peak was
    counted for sizes that were not run. cache: the part of it that holds images.
    """

    peak: int
    available: int
    device: str
    sampling: bool = False
    counted: bool = False
    cache: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    parameters: of the network. operations: floating-point operations of a step's forward and
    backward passes, on all ranks. timed: what was timed where that is not a whole microbatch.
    """

    parameters: int
    operations: int
    memory: Memory
    schedule: Schedule
    timed: str = ""

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.parameters / 1e6:.2f} million parameters",
                f"{self.operations / 1e12:.3f} teraFLOP per step of"
                f" {self.schedule.images.per_step} images"
                f" ({self.operations / self.schedule.computing / 1e12:.3f} teraFLOP/s)",
                *self._memory_lines(),
                *self._step_lines(),
                *(self._run_lines() if self.schedule.steps else self._endless_lines()),
            ]
        )

    def _memory_lines(self) -> list[str]:
        memory, costs = self.memory, self.schedule.costs
        notes = ["reached by a grid of samples"] if memory.sampling else []
        if memory.counted:
            notes.append("counted, not run")
        if memory.cache:
            notes.append(f"{size(memory.cache)} of it images")
        lines = [
            f"{memory.peak / GIB:.2f} GiB of memory at the peak, on the {memory.device}"
            + (", on each rank" if self.schedule.images.ranks > 1 else "")
            + (f" ({'; '.join(notes)})" if notes else "")
        ]
        if costs.worker_bytes:
            lines.append(f"{costs.worker_bytes / GIB:.2f} GiB more in the data loader processes")
        needed = memory.peak + (costs.worker_bytes if memory.device == "CPU" else 0)
        if needed > memory.available:
            lines.append(
                f"too little memory here: {memory.available / GIB:.2f} GiB; lower --microbatch,"
                " or --batch_size, or set --use_checkpoint True"
                + (" or --sample_interval 0" if memory.sampling else "")
            )
        return lines

    def _step_lines(self) -> list[str]:
        schedule = self.schedule
        costs, images, step = schedule.costs, schedule.images, schedule.per_step
        count = images.per_rank / images.microbatch
        terms = [
            f"{count:.3g} x {seconds(costs.microbatch)} for {images.microbatch} image"
            + ("s" if images.microbatch > 1 else ""),
            f"{seconds(costs.optimizer)} optimizer",
        ]
        if costs.exchange:
            terms.append(f"{seconds(costs.exchange)} exchange between ranks")
        if schedule.waiting and not images.cached:
            terms.append(f"{seconds(schedule.waiting)} waiting for images")
        per_day = 86400 * images.per_step / step
        lines = [
            f"{step:.3f} seconds per step: {', '.join(terms)}",
            f"{3600 / step:.0f} steps per hour, {per_day:.3g} images per day",
        ]
        return lines + ([self.timed] if self.timed else [])

    def _run_lines(self) -> list[str]:
        schedule = self.schedule
        parts = ", ".join(
            f"{part.name} {seconds(part.seconds)}"
            + (f" ({part.count})" if part.name != "starting" else "")
            for part in schedule.parts()
        )
        lines = [f"{seconds(schedule.seconds())} for the whole run: {parts}"]
        kept, most = schedule.kept_bytes(), schedule.most_bytes()
        disk = (
            f"{size(schedule.costs.checkpoint_bytes)} on disk per checkpoint, {size(kept)} in all"
        )
        return [*lines, disk + (f", {size(most)} while saving" if most > kept else "")]

    def _endless_lines(self) -> list[str]:
        schedule = self.schedule
        costs, step = schedule.costs, schedule.per_step_with_all
        interval = schedule.settings.save_interval
        between = schedule.saves_between(interval)
        images = 3600 * schedule.images.per_step / step
        lines = [
            f"with checkpoints and samples {3600 / step:.0f} steps, {images:.0f} images per hour;"
            " no end: set --max_steps for the hours of a whole run",
            f"starting {seconds(costs.start)}, a checkpoint {seconds(costs.checkpoint)} every"
            f" {interval} steps"
            + (f" or {schedule.settings.save_minutes:g} minutes" if between else "")
            + (
                f", a grid of samples {seconds(costs.grid)} every {schedule.sample_interval}"
                if schedule.sample_interval
                else ""
            ),
        ]
        disk = f"{size(costs.checkpoint_bytes)} on disk per checkpoint"
        if keep := schedule.settings.keep_checkpoints:
            disk += f", {size((keep + 1) * costs.checkpoint_bytes)} for {keep} and the next"
        if (growth := schedule.bytes_per_day()) > 0:
            disk += f", growing by {size(growth)} per day"
        return [*lines, disk]


def seconds(value: float) -> str:
    """A duration as people read it: 0.25 s, 12 s, 3.4 min, 5.6 hours, 12.3 days."""
    if value < 120:
        return f"{value:.3g} s"
    for unit, length, most in (("min", 60, 7200), ("hours", 3600, 172800)):
        if value < most:
            return f"{value / length:.3g} {unit}"
    return f"{value / 86400:.3g} days"


def size(value: float) -> str:
    """A size of files: 12.3 MB, 4.5 GB."""
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
