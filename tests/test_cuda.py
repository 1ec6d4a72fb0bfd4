"""What differs on a GPU: precisions, loss scaling, NCCL, memory formats, graphs, compiling.

Each test also runs on the CPU where that can do the same. benchmarks/on_gpu.sh runs this file.
"""

import copy
import dataclasses
import math
import shutil
import sys

import pytest
import torch as th
import torch.distributed as dist
from conftest import ROOT, TINY, TINY_DIFFUSION
from golden_util import fill_parameters, relative, tensor
from loop_util import TINY as LOOP_TINY
from loop_util import new_loop
from test_stepper import batch, equal, network, simulate_float16, weights
from torch.nn.parallel import DistributedDataParallel

from guided_diffusion import dist_util, logger
from guided_diffusion.networks.compiled import compiled
from guided_diffusion.runtime.ranks.devices import describe_self
from guided_diffusion.runtime.ranks.rendezvous import Meeting
from guided_diffusion.sampling.images import sample_images
from guided_diffusion.sampling.solvers import SAMPLERS
from guided_diffusion.stepper import PRECISIONS, Stepper

sys.path.insert(0, str(ROOT / "benchmarks"))
import measuring

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("cc")), reason="torch's compiler needs a C compiler"
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
HALVES = [
    ("cpu", "bf16"),
    pytest.param("cuda", "bf16", marks=needs_gpu),
    pytest.param("cuda", "fp16", marks=needs_gpu),
]
ALL = [("cpu", "fp32"), pytest.param("cuda", "fp32", marks=needs_gpu), *HALVES]
# largest differences from float32, as a share of the largest magnitude: of outputs, of gradients
BOUNDS = {"fp32": (1e-4, 1e-3), "fp16": (0.01, 0.03), "bf16": (0.03, 0.06)}
SCALE = 2.0**10  # keeps the gradients of float16 from vanishing, as GradScaler does


@pytest.fixture(autouse=True)
def full_float32():
    """Convolutions in float32 rather than TF32, so that bounds can be tight."""
    before = th.backends.cudnn.allow_tf32
    th.backends.cudnn.allow_tf32 = False
    yield
    th.backends.cudnn.allow_tf32 = before


def output_and_gradients(model, device, precision="fp32", memory_format=th.contiguous_format):
    """On that device, with float32 weights; both come back on the CPU."""
    model = copy.deepcopy(model).to(device, memory_format=memory_format)
    images = tensor("images", 2, TINY.in_channels, TINY.image_size, TINY.image_size)
    images = images.to(device).contiguous(memory_format=memory_format)
    timesteps = th.tensor([1.0, 500.0], device=device)
    with th.autocast(device, PRECISIONS[precision], enabled=precision != "fp32"):
        output = model(images, timesteps)
    (output.float().square().mean() * SCALE).backward()
    gradients = [p.grad.flatten() / SCALE for p in model.parameters()]
    assert all(gradient.dtype == th.float32 for gradient in gradients)
    return output.detach().float().cpu(), th.cat(gradients).cpu()


@pytest.fixture(scope="module")
def model():
    return fill_parameters(TINY.build())


@pytest.fixture(scope="module")
def expected(model):
    return output_and_gradients(model, "cpu")


class TestNetwork:
    @pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
    @pytest.mark.parametrize(("device", "precision"), ALL)
    def test_outputs_and_gradients(self, model, expected, device, precision, memory_format):
        found = output_and_gradients(model, device, precision, memory_format)
        for ours, theirs, bound in zip(found, expected, BOUNDS[precision]):
            assert relative(ours, theirs) < bound

    @pytest.mark.parametrize("use_checkpoint", [True, "norms"])
    @pytest.mark.parametrize(("device", "precision"), ALL)
    def test_recomputing_activations(self, model, device, precision, use_checkpoint):
        recomputing = dataclasses.replace(TINY, use_checkpoint=use_checkpoint).build()
        recomputing.load_state_dict(model.state_dict())
        kept = output_and_gradients(model, device, precision)
        found = output_and_gradients(recomputing, device, precision)
        for ours, theirs in zip(found, kept):
            assert relative(ours, theirs) < 1e-4

    @pytest.mark.parametrize(("device", "precision"), HALVES)
    def test_the_inside_is_in_half_precision(self, model, device, precision):
        seen = []
        twin = copy.deepcopy(model).to(device)
        twin.middle_block.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        with th.autocast(device, PRECISIONS[precision]):
            output = twin(th.zeros(1, 1, 16, 16, device=device), th.ones(1, device=device))
        assert seen == [PRECISIONS[precision]]
        assert output.dtype == th.float32

    @needs_gpu
    def test_a_captured_graph_replays_on_other_images(self, model):
        """Nothing in a forward pass waits for the GPU or depends on what is on the CPU."""
        twin = copy.deepcopy(model).cuda().eval()
        images = [tensor(name, 2, 1, 16, 16).cuda() for name in ("one", "other")]
        timesteps = th.tensor([1.0, 500.0], device="cuda")
        place = images[0].clone()
        with th.no_grad():
            expected = twin(images[1], timesteps)
            side = th.cuda.Stream()
            side.wait_stream(th.cuda.current_stream())
            with th.cuda.stream(side):  # warm-up: libraries allocate their workspaces
                for _ in range(3):
                    twin(place, timesteps)
            th.cuda.current_stream().wait_stream(side)
            graph = th.cuda.CUDAGraph()
            with th.cuda.graph(graph):
                output = twin(place, timesteps)
            place.copy_(images[1])
            graph.replay()
        assert relative(output.cpu(), expected.cpu()) < 1e-4


def new_stepper(device, precision, **options):
    """float16 on a CPU: its loss scaling alone, around float32 arithmetic."""
    stepper = Stepper(network().to(device), lr=1e-2, precision=precision, **options)
    return simulate_float16(stepper) if (device, precision) == ("cpu", "fp16") else stepper


def take(stepper, steps, spoil=()):
    """Steps on a toy problem in two microbatches; the gradients of `spoil` are not finite."""
    for step in steps:
        parts = batch(step).to(stepper.device).chunk(2)
        for number, part in enumerate(parts):
            with stepper.no_sync() if number == 0 else th.enable_grad():
                with stepper.autocast():
                    loss = (stepper.model(part) - 1).float().square().mean() / len(parts)
                stepper.backward(loss * (float("inf") if step in spoil else 1.0))
        stepper.step()


STEPPERS = [*ALL, ("cpu", "fp16")]


class TestStepper:
    @pytest.mark.parametrize(("device", "precision"), STEPPERS)
    def test_weights_follow_float32_on_the_cpu(self, device, precision):
        options = {"weight_decay": 0.1, "max_grad_norm": 0.5, "ema_rates": [0.9]}
        plain = new_stepper("cpu", "fp32", **options)
        other = new_stepper(device, precision, **options)
        before = weights(plain)
        take(plain, range(10))
        take(other, range(10))
        tolerance = 1e-5 if precision == "fp32" else 0.02
        for theirs, ours in ((weights(plain), weights(other)), (plain.ema[0.9], other.ema[0.9])):
            for a, b in zip(theirs, ours):
                th.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance)
        assert not equal(before, weights(plain))
        assert other.skipped() == (0, 0)

    @pytest.mark.parametrize(("device", "precision"), STEPPERS)
    def test_an_overflow_changes_nothing_but_the_loss_scale(self, device, precision):
        stepper = new_stepper(device, precision, max_grad_norm=0.5, ema_rates=[0.9])
        take(stepper, range(3))
        kept = weights(stepper), copy.deepcopy(stepper.ema[0.9])
        moments = copy.deepcopy(stepper.opt.state_dict()["state"])
        scale = stepper.loss_scale()
        take(stepper, [3, 4], spoil=[3, 4])
        assert equal(weights(stepper), kept[0])
        assert equal(stepper.ema[0.9], kept[1])
        for index, values in stepper.opt.state_dict()["state"].items():
            assert equal(values.values(), moments[index].values())
        assert stepper.skipped() == (2, 2)
        assert math.log2(scale / stepper.loss_scale()) == (2 if precision == "fp16" else 0)
        take(stepper, [5])
        assert not equal(weights(stepper), kept[0])
        assert stepper.skipped() == (0, 2)

    @pytest.mark.parametrize(("device", "precision"), STEPPERS)
    def test_one_rank_of_a_process_group(self, monkeypatch, device, precision):
        """DistributedDataParallel over NCCL on a GPU, over Gloo on the CPU."""
        alone = new_stepper(device, precision, max_grad_norm=0.5)
        take(alone, range(4), spoil=[1])
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", device)
        store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
        place = th.device(device, 0) if device == "cuda" else th.device(device)
        meeting = Meeting(0, store, "127.0.0.1", [describe_self()], place)
        world = dist_util._form_group(meeting, 60.0)
        # no other rank will say goodbye
        monkeypatch.setattr(dist_util, "_world", dataclasses.replace(world, timeout_s=0.0))
        try:
            assert dist.get_backend() == ("nccl" if device == "cuda" else "gloo")
            assert dist_util.dev() == place
            with monkeypatch.context() as patch:
                patch.setattr(dist_util, "world_size", lambda: 2)  # else it needs no exchange
                together = new_stepper(device, precision, max_grad_norm=0.5)
            assert isinstance(together.model, DistributedDataParallel)
            take(together, range(4), spoil=[1])
            assert together.skipped() == (0, 1)
            for ours, theirs in zip(weights(together), weights(alone)):
                th.testing.assert_close(ours, theirs)
            assert dist_util.agree_max(3) == 3
            assert dist_util.broadcast_object("a") == "a"
            dist_util.barrier()
        finally:
            dist_util.cleanup()
        assert not dist.is_initialized()


@needs_gpu
class TestWaiting:
    """Nothing in a training step waits for the GPU."""

    @pytest.fixture
    def strict(self):
        yield lambda: th.cuda.set_sync_debug_mode("error")
        th.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("precision", list(PRECISIONS))
    def test_a_step(self, folder, strict, precision):
        loop = new_loop(model=LOOP_TINY.build().cuda(), precision=precision, microbatch=2)
        images = th.rand(4, 1, 8, 8) * 2 - 1
        for _ in range(2):  # tables move to the GPU, the optimizer's state is allocated
            loop.run_step(images, {})
        th.cuda.synchronize()
        strict()
        loop.run_step(images, {})


@needs_gpu
@needs_compiler
class TestCompiled:
    def test_training(self, folder):
        losses = {}
        for compile_it in (False, True):
            model = LOOP_TINY.build()
            fill_parameters(model)
            loop = new_loop(model=model.cuda(), compile=compile_it)
            losses[compile_it] = []
            for step in range(3):
                loop.run_step(tensor(f"batch {step}", 4, 1, 8, 8).clamp(-1, 1), {})
                losses[compile_it].append(logger.dumpkvs()["loss"])
        assert losses[True] == pytest.approx(losses[False], rel=1e-3)

    def test_sampling_from_a_graph(self):
        network = fill_parameters(LOOP_TINY.build()).cuda().eval()
        plain, fast = sample(network, "cuda"), sample(compiled(network), "cuda")
        assert relative(fast, plain) < 1e-3


def sample(network, device, sampler="dpm++2m"):
    size = LOOP_TINY.image_size
    with th.no_grad():
        images = sample_images(
            network,
            TINY_DIFFUSION.build(),
            (1, size, size),
            range(3),
            sampler=sampler,
            steps=4,
            device=device,
        )
    return images.cpu()


@needs_gpu
class TestSampling:
    @pytest.mark.parametrize("sampler", list(SAMPLERS))
    def test_the_images_are_the_cpu_s(self, sampler):
        network = fill_parameters(LOOP_TINY.build()).eval()
        expected = sample(network, "cpu", sampler)
        assert relative(sample(network.cuda(), "cuda", sampler), expected) < 1e-2

    def test_in_float16(self):
        network = fill_parameters(LOOP_TINY.build()).eval()
        expected = sample(network, "cpu")
        network.convert_to_fp16()
        assert relative(sample(network.cuda(), "cuda"), expected) < 0.1


class TestBenchmarks:
    """The parts of the benchmarks that differ."""

    @pytest.mark.parametrize("device", DEVICES)
    def test_a_profile_names_the_slowest(self, capsys, device):
        left = th.ones(256, 256, device=device)
        case = measuring.Case("product", lambda: left @ left + 1, 2 * 256**3)
        case.call()
        lines = measuring.print_profile(case, th.device(device), 2)
        assert len(lines) == 2
        assert lines[0]["seconds"] >= lines[1]["seconds"] > 0
        assert lines[0]["name"][:100] in capsys.readouterr().out

    @pytest.mark.parametrize(("device", "precision"), ALL)
    def test_the_rate_of_a_product(self, monkeypatch, device, precision):
        th.backends.cudnn.allow_tf32 = True  # as by default
        monkeypatch.setattr(measuring, "PRODUCT_SIDE", {"cpu": 64, "cuda": 1024})
        case = measuring.matrix_product(precision, th.device(device))
        before = th.get_float32_matmul_precision()
        seconds = measuring.elapsed(case.call, th.device(device))
        assert seconds > 0
        assert case.operations == 2 * (64 if device == "cpu" else 1024) ** 3
        assert th.get_float32_matmul_precision() == before
