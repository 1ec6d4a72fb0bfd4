"""Half precision, and numbers that are not finite, in the training loop."""

import itertools
import math

import numpy as np
import pytest
import torch as th
from loop_util import TINY, batches, furthest, logged_losses, new_loop, rows, run_in, weights
from test_stepper import simulate_float16

from guided_diffusion import logger
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.train_util import TrainLoop, find_start
from guided_diffusion.training.run import precision_of

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")


def spoilt(*steps: int, image: int = 0):
    """Batches in which a pixel of one image is not a number at the given steps."""

    def data(first):
        for step, (images, cond) in enumerate(batches(first), first):
            if step in steps:
                images[image, 0, 3, 3] = float("nan")
            yield images, cond

    return data


class TestNotFinite:
    def test_a_bad_step_is_skipped_and_counted(self, tmp_path):
        loop = run_in(tmp_path / "run", 5, data=spoilt(1, 3), save_interval=1)
        at = [checkpoint.load(str(tmp_path / f"run/model00000{step}.pt")) for step in range(1, 6)]
        moved = [furthest(one, other) > 0 for one, other in itertools.pairwise(at)]
        assert moved == [False, True, False, True]
        assert loop.stepper.skipped() == (0, 2)
        assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == ["0", "1", "1", "2", "2"]
        assert all(th.isfinite(value).all() for value in weights(loop).values())

    def test_the_count_survives_a_restart(self, tmp_path):
        run_in(tmp_path / "whole", 6, data=spoilt(1, 2), save_interval=1)
        run_in(tmp_path / "parts", 3, 6, data=spoilt(1, 2), save_interval=1)
        assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")
        path = tmp_path / "more"
        options = {"data": spoilt(1, 2, 3, 4), "max_skipped_steps": 3}
        run_in(path, 3, **options)
        with pytest.raises(UserError, match="no finite gradient in 3 steps in a row, since step 1"):
            run_in(path, 9, **options)

    @pytest.mark.parametrize(("microbatch", "image"), [(-1, 0), (1, 2), (3, 3)])
    def test_too_many_in_a_row_end_the_run(self, tmp_path, microbatch, image):
        folder = tmp_path / "run"
        with pytest.raises(UserError) as error:
            run_in(
                folder,
                20,
                data=spoilt(2, 4, 5, 6, 7, 8, image=image),
                save_interval=4,
                max_skipped_steps=3,
                microbatch=microbatch,
            )
        assert str(error.value) == (
            "no finite gradient in 3 steps in a row, since step 4: loss terms vb, mse, loss;"
            " layer input_blocks.0.0 is the first whose output is not finite; the last good"
            " checkpoint is at step 4. Lower --lr, set --max_grad_norm, or train in bf16 or fp32"
        )
        saved = checkpoint.load(str(folder / "model000004.pt"))
        assert all(th.isfinite(value).all() for value in saved.values())
        assert find_start(str(folder)).step == 4

    def test_zero_never_ends_it(self, tmp_path):
        loop = run_in(tmp_path, 6, data=spoilt(*range(6)), max_skipped_steps=0)
        assert loop.stepper.skipped() == (6, 6)

    def test_a_layer_that_overflows(self, tmp_path):
        logger.configure(str(tmp_path), [])
        loop = new_loop(max_skipped_steps=1)
        with th.no_grad():
            loop.model.middle_block[1].qkv.weight.mul_(1e38)
        with pytest.raises(
            UserError, match=r"loss terms .*layer middle_block\.1\..*none was saved"
        ):
            loop.run_loop()
        logger.reset()

    def test_a_gradient_that_overflows(self, tmp_path):
        """Finite losses, and a gradient that is not: the first layer behind is named."""

        class Broken(th.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad * float("inf")

        logger.configure(str(tmp_path), [])
        loop = new_loop(max_skipped_steps=1)
        with th.no_grad():
            loop.model.out[2].weight.fill_(0.1)  # zero at first: nothing would come through it
        loop.model.middle_block[2].register_forward_hook(lambda *call: Broken.apply(call[2]))
        with pytest.raises(UserError, match=r"all loss terms finite; .* from middle_block\.2\."):
            loop.run_loop()
        logger.reset()


class TestFloat16:
    """Loss scaling on the CPU, around float32 arithmetic."""

    @pytest.fixture
    def simulated(self, monkeypatch):
        class Simulated(TrainLoop):
            def _resume(self, start):
                simulate_float16(self.stepper)
                super()._resume(start)

        monkeypatch.setattr("loop_util.TrainLoop", Simulated)

    def test_the_loss_scale_and_its_history_survive_a_restart(self, tmp_path, simulated):
        options = {"data": spoilt(1, 6), "save_interval": 3}
        run_in(tmp_path / "whole", 9, **options)
        run_in(tmp_path / "parts", 3, 7, 8, 9, **options)
        assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")
        scales = [math.log2(float(row["loss_scale"])) for row in rows(tmp_path / "parts")]
        # doubled after three good steps, some before and some after a restart
        assert scales == [16, 15, 15, 15, 16, 16, 15, 15, 15]
        ours, theirs = (
            (tmp_path / name / "model000009.pt").read_bytes() for name in ("whole", "parts")
        )
        assert ours == theirs

    def test_one_that_diverges_stops(self, tmp_path, simulated):
        with pytest.raises(UserError, match="no finite gradient in 5 steps in a row"):
            run_in(tmp_path, 50, data=spoilt(*range(3, 50)), max_skipped_steps=5)

    def test_on_a_cpu_it_is_float32_and_says_so(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "cpu")
        logger.configure(str(tmp_path), ["stdout"])
        assert precision_of("", True) == "fp32"
        assert precision_of("fp16", False) == "fp32"
        assert "float16 needs CUDA: training in float32 on the CPU" in capsys.readouterr().out
        assert precision_of("bf16", True) == "bf16"
        assert precision_of("", False) == "fp32"
        logger.reset()
        plain = run_in(tmp_path / "plain", 2)
        half = run_in(tmp_path / "half", 2, use_fp16=True)
        assert furthest(weights(plain), weights(half)) == 0


class TestBfloat16:
    def test_losses_follow_float32(self, tmp_path):
        run_in(tmp_path / "fp32", 12)
        loop = run_in(tmp_path / "bf16", 12, precision="bf16")
        full, half = (
            np.array([float(row["mse"]) for row in rows(tmp_path / name)])
            for name in ("fp32", "bf16")
        )
        np.testing.assert_allclose(half, full, rtol=0.05)
        assert (half != full).any()
        assert all(value.dtype == th.float32 for value in weights(loop).values())

    def test_the_network_computes_in_it(self, tmp_path):
        logger.configure(str(tmp_path), [])
        loop, seen = new_loop(precision="bf16"), []
        loop.model.middle_block.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        images, cond = next(batches())
        _, _, terms = loop.losses(loop.model, images, cond, slice(0, 4))
        logger.reset()
        assert seen == [th.bfloat16]
        assert terms["loss"].dtype == th.float32

    def test_checkpoints_are_interchangeable(self, tmp_path):
        run_in(tmp_path, 2, precision="bf16")
        saved = checkpoint.load(str(tmp_path / "model000002.pt"))
        assert all(value.dtype == th.float32 for value in saved.values())
        loop = run_in(tmp_path, 4, precision="fp32")
        assert loop.step == 4
        run_in(tmp_path, 6, precision="bf16")


def on_gpu():
    th.manual_seed(1)
    return {"model": TINY.build().cuda()}


@needs_gpu
class TestOnGpu:
    def losses(self, folder, steps, **options):
        run_in(folder, *steps, **options)
        return np.array([float(row["mse"]) for row in rows(folder)])

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_losses_follow_float32(self, tmp_path, precision):
        full = self.losses(tmp_path / "full", [60], more=on_gpu)
        half = self.losses(tmp_path / "half", [60], more=on_gpu, precision=precision)
        np.testing.assert_allclose(half[-20:].mean(), full[-20:].mean(), rtol=0.05)
        saved = checkpoint.load(str(tmp_path / "half" / "model000060.pt"))
        assert all(value.dtype == th.float32 for value in saved.values())

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_a_restart(self, tmp_path, precision):
        whole = self.losses(tmp_path / "whole", [20], more=on_gpu, precision=precision)
        parts = self.losses(tmp_path / "parts", [7, 20], more=on_gpu, precision=precision)
        np.testing.assert_allclose(parts, whole, rtol=1e-3 if precision == "fp32" else 2e-2)
        assert parts[7] == whole[7]  # the first step after the restart has the same weights
