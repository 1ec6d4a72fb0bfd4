"""What every sampler offers: timesteps, options, callbacks, errors."""

from itertools import pairwise

import pytest
import torch as th
from diffusion_util import make_diffusion, process, toy
from golden_util import tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_util import DETERMINISTIC, run, step_noise

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.solvers import (
    SAMPLERS,
    heun_timesteps,
    multistep_timesteps,
    uniform_timesteps,
)

ONE = tensor("solvers/one", 1, 1, 4, 4)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_network_receives_the_original_timesteps(name, rescale):
    seen = []

    def spy(x, t, label):
        assert label == "unchanged"
        seen.append(t)
        return toy(x, t)

    diffusion = make_diffusion("cosine", 400, spacing="50", rescale=rescale)
    model_kwargs = {"label": "unchanged"}
    run(name, diffusion, spy, tensor("solvers/two", 2, 3, 4, 4), 6, model_kwargs=model_kwargs)
    assert all(t.shape == (2,) and t.is_floating_point() == rescale for t in seen)
    scale = 1000 / 400 if rescale else 1
    allowed = {round(i * scale, 3) for i in diffusion.timestep_map}
    network_timesteps = [round(t[0].item(), 3) for t in seen]
    assert set(network_timesteps) <= allowed
    assert network_timesteps[0] == round(399 * scale, 3)
    assert network_timesteps[-1] == 0
    # Heun: twice a step, except the last one and those that are too long for it.
    assert (7 <= len(network_timesteps) <= 11) if name == "heun" else len(network_timesteps) == 6


@pytest.mark.parametrize("name", SAMPLERS)
def test_clipping_and_denoised_fn(name):
    noise, diffusion = tensor("solvers/two", 2, 1, 4, 4), make_diffusion("cosine", 100)
    seen = []

    def denoised_fn(x):
        seen.append(x)
        return x * 0 + 3

    for clip, value in ((True, 1.0), (False, 3.0)):
        options = {"denoised_fn": denoised_fn, "clip_denoised": clip}
        image = run(name, diffusion, toy, noise, 5, **options)
        assert th.allclose(image, th.full_like(noise, value))
    assert len(seen) >= 2 * 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step(name):
    seen = []
    diffusion = make_diffusion("linear", 100)
    image = run(name, diffusion, toy, ONE, 7, callback=seen.append)
    assert [item["step"] for item in seen] == list(range(7))
    timesteps = [item["timestep"] for item in seen]
    assert timesteps[0] == 99
    assert timesteps[-1] == 0
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert all(item["pred_xstart"].shape == (1, 1, 4, 4) for item in seen)
    assert th.equal(seen[-1]["sample"], image)
    assert th.equal(seen[-1]["pred_xstart"], image)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_draw_nothing(name):
    def refuse(x, i):
        raise AssertionError("drew noise")

    state = th.get_rng_state()
    diffusion = make_diffusion("linear", 100)
    assert th.equal(*(run(name, diffusion, toy, ONE, 5, noise_fn=refuse) for _ in range(2)))
    assert th.equal(th.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_their_batch(name):
    diffusion, noise = make_diffusion("linear", 100), tensor("solvers/image", 3, 3, 4, 4)
    together = run(name, diffusion, toy, noise, 9, noise_fn=step_noise)
    alone = run(
        name, diffusion, toy, noise[1:2], 9, noise_fn=lambda x, i: step_noise(noise, i)[1:2]
    )
    assert th.allclose(together[1:2], alone, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("timesteps", [1, 2, 3, 30])
def test_any_number_of_steps(name, timesteps):
    diffusion = make_diffusion("cosine", timesteps)
    for steps in range(1, timesteps + 1):
        image = run(name, diffusion, toy, ONE, steps)
        assert image.isfinite().all()
        assert image.abs().max() <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedule_that_ends_in_pure_noise(name):
    arguments = process("cosine", 50, ModelMeanType.START_X)
    arguments["betas"][-1] = 1.0
    diffusion = GaussianDiffusion(**arguments)
    assert run(name, diffusion, toy, ONE, 10, clip_denoised=False).isfinite().all()


@pytest.mark.parametrize("choose", [uniform_timesteps, multistep_timesteps, heun_timesteps])
@given(st.sampled_from(["linear", "cosine"]), st.integers(21, 300), st.data())
@settings(max_examples=40, deadline=None)
def test_timesteps_fall_from_last_to_first(choose, schedule, timesteps, data):
    steps = data.draw(st.integers(1, timesteps))
    chosen = choose(make_diffusion(schedule, timesteps), steps)
    assert len(chosen) == steps
    assert chosen[0] == timesteps - 1
    assert all(a > b for a, b in pairwise(chosen))
    if steps > 1:
        assert chosen[-1] == 0


def test_samplers_name_their_paper():
    assert all("arXiv" in sampler.run.__doc__ for sampler in SAMPLERS.values())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, 101])
def test_impossible_number_of_steps(name, steps):
    with pytest.raises(UserError, match=f"--steps {steps}: .*from 1 to 100"):
        run(name, make_diffusion("linear", 100), toy, ONE, steps)


@pytest.mark.parametrize("name", ["ddpm", "heun", "unipc"])
def test_eta_is_for_samplers_that_add_noise_by_it(name):
    with pytest.raises(UserError, match=r"--eta 0\.5 is for --sampler ddim or dpm\+\+2m"):
        run(name, make_diffusion("linear", 100), toy, ONE, 3, eta=0.5)


def test_unknown_name():
    with pytest.raises(UserError, match=r"'euler'.*ddpm, ddim, dpm\+\+2m, heun, unipc"):
        run("euler", make_diffusion("linear", 100), toy, ONE, 3)
