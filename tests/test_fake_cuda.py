"""What runs on a GPU puts nothing on the wrong device and waits for nothing, checked without one.

Tensors without contents that claim to be on a GPU: operations between devices fail, and so does
whatever needs a tensor's contents on the CPU. Backward passes cannot run so.
"""

import pytest
import torch as th
from conftest import TINY
from loop_util import DIFFUSION, new_loop
from loop_util import TINY as LOOP_TINY
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from guided_diffusion import train_util
from guided_diffusion.runtime import rng
from guided_diffusion.sampling.solvers import SAMPLERS, WITH_ETA, SamplerOptions, sample
from guided_diffusion.stepper import PRECISIONS, Stepper


def normal(_seed, _purpose, indices, shape, device="cpu"):
    return th.randn(len(indices), *shape, device=device)


@pytest.fixture
def fake(monkeypatch):
    """Inside, tensors may be on "cuda"."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(th.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(rng, "normal", normal)  # its generators are real
    monkeypatch.setattr(train_util, "log_loss_dict", lambda *args: None)  # needs real timesteps
    with FakeTensorMode() as mode:
        yield mode


def on_gpu(config):
    with th.device("cuda"):
        return config.build()


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_training_step(folder, monkeypatch, fake, precision):
    # the backward pass is left out
    monkeypatch.setattr(Stepper, "backward", lambda self, loss: self.scaler.scale(loss))
    loop = new_loop(model=on_gpu(LOOP_TINY), precision=precision, microbatch=2)
    assert loop.device.type == "cuda"
    assert loop.stepper.precision == precision
    batch = th.rand(4, 1, 8, 8)
    for _ in range(2):
        for parameter in loop.model.parameters():
            parameter.grad = th.ones_like(parameter)
        loop.run_step(batch, {})
    with pytest.raises(DataDependentOutputException):
        loop.stepper.skipped()  # so waiting is noticed


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_sampling(fake, sampler):
    images = sample(
        sampler,
        DIFFUSION.build(),
        on_gpu(LOOP_TINY).eval(),
        (2, 1, 8, 8),
        steps=4,
        noise=th.randn(2, 1, 8, 8, device="cuda"),
        options=SamplerOptions(eta=float(sampler in WITH_ETA), device="cuda"),
    )
    assert images.device.type == "cuda"
    assert images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_segmentation(fake, precision):
    with th.device("cuda"):
        network = TINY.build_segmentation(3, None, 1).eval()
    with th.no_grad(), th.autocast("cuda", PRECISIONS[precision], enabled=precision != "fp32"):
        scores = network(th.zeros(2, 1, 16, 16, device="cuda"))
    assert (scores.device.type, scores.dtype) == ("cuda", th.float32)
    assert scores.shape == (2, 3, 16, 16)
