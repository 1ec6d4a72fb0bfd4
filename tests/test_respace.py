"""Choosing timesteps, and the process over the chosen ones."""

import json

import numpy as np
import pytest
import torch as th
from diffusion_util import process
from golden_util import GOLDEN, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.runtime.errors import UserError

RECORDED = json.loads((GOLDEN / "space_timesteps.json").read_text())


@pytest.mark.parametrize("case", RECORDED)
def test_agrees_with_recorded_timesteps(case):
    steps, spec = case.split("/")
    assert sorted(space_timesteps(int(steps), spec)) == RECORDED[case]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 40))
@settings(deadline=None)
def test_sections_hold_what_was_asked_for(counts, more):
    sections = len(counts)
    total = max(counts) * sections + more
    retained = sorted(space_timesteps(total, counts))
    assert retained == sorted(space_timesteps(total, ",".join(map(str, counts))))
    assert len(retained) == sum(counts)
    edges = np.cumsum([0] + [total // sections + (i < total % sections) for i in range(sections)])
    for i, count in enumerate(counts):
        inside = [t for t in retained if edges[i] <= t < edges[i + 1]]
        assert len(inside) == count
        assert inside[0] == edges[i]
        if count > 1:
            assert inside[-1] == edges[i + 1] - 1
            gaps = np.diff(inside)
            assert gaps.max() - gaps.min() <= 1


@given(st.integers(2, 400), st.integers(1, 400))
@settings(deadline=None)
def test_ddim_takes_an_integer_stride_or_refuses(steps, count):
    possible = {len(range(0, steps, stride)): stride for stride in range(steps - 1, 0, -1)}
    if count in possible:
        expected = set(range(0, steps, possible[count]))
        assert space_timesteps(steps, f"ddim{count}") == expected
    else:
        with pytest.raises(UserError, match=rf"exactly {count} of {steps}.*ddim(\d+)") as caught:
            space_timesteps(steps, f"ddim{count}")
        suggested = int(str(caught.value).split("possible is ddim")[1].split(";")[0])
        assert len(space_timesteps(steps, f"ddim{suggested}")) == suggested


@pytest.mark.parametrize("spec", ["", "fast", "10,", "ddim", "ddimx", "10;20", "1.5"])
def test_unreadable_spec(spec):
    with pytest.raises(UserError, match="neither 'ddimN' nor numbers"):
        space_timesteps(100, spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("101", "asks for 101 of a section of 100 timesteps"),
        ("10,60", "asks for 60 of a section of 50 timesteps"),
        ("10,0", "at least 1 timestep"),
        ([], "at least 1 timestep"),
    ],
)
def test_spec_that_does_not_fit(spec, message):
    with pytest.raises(UserError, match=message):
        space_timesteps(100, spec)


@given(st.sets(st.integers(0, 99), min_size=1))
@settings(max_examples=50, deadline=None)
def test_signal_is_that_of_the_original(retained):
    original = GaussianDiffusion(**process())
    spaced = SpacedDiffusion(retained, **process())
    assert spaced.num_timesteps == len(retained)
    assert spaced.timestep_map == sorted(retained)
    np.testing.assert_allclose(
        spaced.alphas_cumprod, original.alphas_cumprod[sorted(retained)], rtol=1e-9
    )


def test_all_timesteps_are_the_original():
    original = GaussianDiffusion(**process())
    spaced = SpacedDiffusion(range(100), **process())
    np.testing.assert_allclose(spaced.betas, original.betas, rtol=1e-9)


@pytest.mark.parametrize("rescale", [False, True])
def test_network_and_guidance_are_told_original_timesteps(rescale):
    spaced = SpacedDiffusion({3, 40, 98}, **process(rescale=rescale))
    x, t = tensor("respace/x", 3, 1, 2, 2), th.tensor([2, 0, 1])
    expected = th.tensor([98, 3, 40]) * (10.0 if rescale else 1)
    calls = []

    def spy(x, t, **kwargs):
        assert kwargs == {"y": 5}
        assert t.is_floating_point() == rescale
        assert th.equal(t, expected.to(t.dtype))
        calls.append(t)
        return x

    kwargs = {"model_kwargs": {"y": 5}}
    out = spaced.p_mean_variance(spy, x, t, **kwargs)
    spaced.training_losses(spy, x, t, **kwargs)
    spaced.condition_mean(spy, out, x, t, **kwargs)
    spaced.condition_score(spy, out, x, t, **kwargs)
    spaced.ddim_sample(spy, x, t, cond_fn=spy, **kwargs)
    spaced.ddim_reverse_sample(spy, x, t, **kwargs)
    spaced.p_sample(spy, x, t, cond_fn=spy, **kwargs)
    assert len(calls) == 9


def test_timesteps_that_are_not_there():
    with pytest.raises(UserError, match="at least one"):
        SpacedDiffusion([], **process())
    with pytest.raises(UserError, match="timesteps 5 to 100 to retain"):
        SpacedDiffusion([5, 100], **process())
