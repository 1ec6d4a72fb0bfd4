"""The parts of a training run, to be timed one by one on random images."""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch as th

from guided_diffusion import dist_util
from guided_diffusion.images.cache import free_memory
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.live_memory import LiveTensors, fake_tensors
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.runtime.memory import KEPT_BELOW, held_by_process, peak_of_process
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.sampling.images import preview_images
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.diffusion import GRID_IMAGES
from guided_diffusion.training.guidance import GUIDED_GRID_IMAGES
from guided_diffusion.training.pieces import Piece, pieces_of
from guided_diffusion.training.run import Run

Clock = Callable[[], float]
AnyRun = Run[ModelConfig, TrainConfig]


class Counted(NamedTuple):
    """Bytes of tensors, weights included: at the peak of a microbatch, kept by the process after
    it, and at the peak of evaluating the network for a grid of samples after that."""

    training: int
    kept: int
    sampling: int


class Trial:
    """The network on its device in its training loop, and the pieces of work to time."""

    def __init__(self, run: AnyRun, clock: Clock) -> None:
        self.run, self.clock = run, clock
        self.device = dist_util.dev()
        self.on_gpu = self.device.type == "cuda"
        self.loop = run.loop(TrainLoop, run.build(), lambda step: iter(()))
        self.stepper = self.loop.stepper
        count = run.train.batch_size
        self.whole = Piece(min(self.loop.microbatch, count), run.model.image_size)
        # with several microbatches, a step's gradients are there while the next one is computed
        self.accumulates = self.whole.images < count
        guided = isinstance(run.model, GuidedConfig)
        samples = min(GUIDED_GRID_IMAGES, count) if guided else GRID_IMAGES
        self.grid = Piece(samples, self.whole.side)
        self.multiple = 2 ** (len(run.model.mult()) - 1)
        self._operations = functools.cache(self._count_operations)
        self.counted = functools.cache(self._count)
        # what counting itself takes: it imports much of torch that a run does not
        held, began = held_by_process(), clock()
        smallest = pieces_of(self.whole, self.multiple)[0]
        self.operations(smallest, backward=True)
        if not self.on_gpu:
            self.counted(smallest, smallest)
        self.counting_bytes = max(0, held_by_process() - held)
        self.counting_seconds = clock() - began

    def elapsed(self, call: Callable[[], object]) -> float:
        """Seconds of a call, on the slowest rank, with all the work that it gives the device."""
        self._wait()
        began = self.clock()
        call()
        self._wait()
        return dist_util.agree_max(round(1e9 * (self.clock() - began))) / 1e9

    def _wait(self) -> None:
        if self.on_gpu:
            th.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            th.mps.synchronize()

    def arguments(self, piece: Piece) -> dict[str, th.Tensor]:
        """The network's further arguments, on the CPU."""
        model = self.run.model
        more = {"y": th.zeros(piece.images, dtype=th.int64)} if model.class_cond else {}
        if isinstance(model, GuidedConfig):
            shape = (piece.images, model.num_segmentation_classes - 1, piece.side, piece.side)
            more["cond"] = th.zeros(shape, dtype=th.uint8)
        return more

    def images(self, piece: Piece) -> th.Tensor:
        """Random images in [-1, 1], on the CPU."""
        shape = (piece.images, self.run.model.in_channels, piece.side, piece.side)
        return th.rand(shape) * 2 - 1

    def train(self, piece: Piece, exchange: bool | None = None) -> float:
        """Seconds of forward and backward pass of a microbatch.

        :param exchange: of the gradients between ranks; by default with a step's only microbatch.
        """
        if not self.accumulates:
            self.stepper.opt.zero_grad(set_to_none=True)
        images, arguments = self.images(piece), self.arguments(piece)
        exchange = not self.accumulates if exchange is None else exchange
        self.loop.microbatch = piece.images

        def call() -> None:
            self.loop.forward_backward(images, arguments)

        with contextlib.nullcontext() if exchange else self.stepper.no_sync():
            return self._within_memory(call)

    def sample(self, piece: Piece) -> float:
        """Seconds of an evaluation of the network for a grid of samples."""
        self.stepper.opt.zero_grad(set_to_none=True)
        images = self.images(piece).to(self.device)
        arguments = {k: v.to(self.device) for k, v in self.arguments(piece).items()}
        steps = th.zeros(piece.images, device=self.device)
        with th.no_grad(), self.stepper.autocast():
            self.loop.model.eval()
            try:
                return self._within_memory(lambda: self.loop.model(images, steps, **arguments))
            finally:
                self.loop.model.train()

    def _within_memory(self, call: Callable[[], object]) -> float:
        """:raises torch.OutOfMemoryError: on CUDA, with the memory free again."""
        try:
            return self.elapsed(call)
        except th.OutOfMemoryError:
            self.stepper.opt.zero_grad(set_to_none=True)
            th.cuda.empty_cache()
            raise

    def update(self) -> float:
        """Seconds of what follows once per step: clipping, AdamW, moving averages."""
        return self.elapsed(lambda: self.stepper.step(0.0))

    def operations(self, piece: Piece, backward: bool) -> int:
        """Floating-point operations of a piece."""
        return self._operations(piece.side, backward) * piece.images

    def _count_operations(self, side: int, backward: bool) -> int:
        one = Piece(1, side)
        network = self._twin("meta")
        return operations_of(
            network, self.images(one), th.zeros(1), backward=backward, **self.arguments(one)
        )

    def _twin(self, device: th.device | str) -> th.nn.Module:
        with th.device(device):
            network = self.run.model.build()
        if callable(to_float32 := getattr(network, "convert_to_fp32", None)):
            to_float32()
        return network

    def _count(self, trained: Piece, sampled: Piece) -> Counted:
        with fake_tensors(), LiveTensors(0 if self.on_gpu else KEPT_BELOW) as live:
            network = self._twin(self.device)
            if self.accumulates:
                for parameter in network.parameters():
                    parameter.grad = th.empty_like(parameter)
            self._fake_call(network, trained).float().square().mean().backward()
            network.zero_grad(set_to_none=True)
            training, kept = live.peak, live.kept
            live.restart_peak()
            with th.no_grad():
                self._fake_call(network.eval(), sampled)
            return Counted(training, kept, live.peak)

    def _fake_call(self, network: th.nn.Module, piece: Piece) -> th.Tensor:
        arguments = {k: v.to(self.device) for k, v in self.arguments(piece).items()}
        with self.stepper.autocast():
            steps = th.zeros(piece.images, device=self.device)
            return network(self.images(piece).to(self.device), steps, **arguments)

    def evaluations(self) -> int:
        """How often a grid of samples evaluates the network."""
        calls = 0
        outputs = self.run.model.in_channels * (2 if self.run.model.learn_sigma else 1)

        def network(x: th.Tensor, *_: object, **__: object) -> th.Tensor:
            nonlocal calls
            calls += 1
            return x.new_zeros(len(x), outputs, *x.shape[2:])

        shape = (self.run.model.in_channels, 1, 1)
        preview_images(network, self.run.diffusion.build(), shape, 1, "cpu")
        return calls

    def grid_bytes(self) -> int:
        """Bytes of a grid of samples, whose noise no format compresses."""
        rows = 3 if isinstance(self.run.model, GuidedConfig) else 1
        return rows * self.grid.images * self.run.model.in_channels * self.grid.side**2

    def save(self) -> tuple[int, float]:
        """Bytes and seconds of a checkpoint.

        The file of the weights is written; those of the averages are as large, and that of AdamW,
        with two moments per weight, is twice as large.
        """
        sizes: list[int] = []

        def write() -> None:
            if dist_util.is_main():
                weights = self.stepper.weights_as_state_dict()
                sizes.append(checkpoint.try_saving(self.run.folder, weights))

        seconds = self.elapsed(write)
        files = 1 + len(self.loop.ema_rates) + 2
        return files * sum(sizes), files * seconds


def peak_memory() -> int:
    """The most memory taken until now, bytes: of the allocator on CUDA, else of the process."""
    if dist_util.dev().type == "cuda":
        return th.cuda.max_memory_allocated(dist_util.dev())
    return peak_of_process()


def held_memory() -> int:
    """The memory taken now, bytes: of the allocator on CUDA, else of the process."""
    if dist_util.dev().type == "cuda":
        return th.cuda.memory_allocated(dist_util.dev())
    return held_by_process()


def available_memory() -> int:
    """What there is for this process, bytes, with what it has already."""
    if dist_util.dev().type == "cuda":
        return th.cuda.get_device_properties(dist_util.dev()).total_memory
    return free_memory() + peak_of_process()
