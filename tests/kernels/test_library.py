"""When kernels are called."""

import sys
from subprocess import run

import pytest
import torch as th
from conftest import TINY
from golden_util import fill_parameters, relative, tensor
from kernels_util import needs_kernels
from torch._subclasses import FakeTensorMode

from guided_diffusion.kernels import library
from guided_diffusion.kernels.library import SWITCH, describe, is_plain, usable

IMAGES = tensor("images", 2, TINY.in_channels, TINY.image_size, TINY.image_size)
TIMESTEPS = th.tensor([1.0, 500.0])


def output_and_gradients(model):
    output = model(IMAGES, TIMESTEPS)
    gradients = th.autograd.grad(output.square().mean(), [*model.parameters()])
    return output.detach(), th.cat([gradient.flatten() for gradient in gradients])


@needs_kernels
def test_a_network_computes_the_same_without_them(monkeypatch):
    model = fill_parameters(TINY.build())
    with_kernels = output_and_gradients(model)
    monkeypatch.setattr(library, "library", lambda: None)
    assert not usable(IMAGES)
    without = output_and_gradients(model)
    assert not th.equal(with_kernels[0], without[0])  # they were really used, and really not
    for found, expected in zip(with_kernels, without):
        assert relative(found, expected) < 1e-5


@needs_kernels
def test_a_network_of_tensors_without_memory():
    with FakeTensorMode():
        x, steps = th.empty(2, 1, 16, 16), th.empty(2)
        assert not is_plain(x)
        TINY.build()(x, steps).sum().backward()
    with th.device("meta"):
        assert not usable(th.empty(2, 1, 16, 16))


@needs_kernels
def test_batched_tensors_are_left_to_torch():
    seen = []
    th.vmap(lambda x: seen.append(is_plain(x)) or x)(th.ones(2, 3))
    assert seen == [False]


@needs_kernels
@pytest.mark.parametrize(
    "variables",
    [{SWITCH: "off"}, {"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}],
)
def test_switched_off(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    program = "from guided_diffusion.kernels.library import describe; print(describe())"
    done = run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "torch's own kernels\n", done.stderr
    assert "compiled" in describe()
