"""Loops over all timesteps: ancestral sampling, DDIM there and back, the variational bound."""

import pytest
import torch as th
from diffusion_util import make_diffusion, toy_network
from golden_util import tensor

from guided_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType, starting_noise


def test_guided_loops_use_the_gradient():
    diffusion = make_diffusion("linear", 30)
    noise, toy = tensor("guided/x", 2, 1, 4, 4), toy_network(learn=False)
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        pushed = [
            loop(
                lambda x, t, **kwargs: toy(x, t),
                noise.shape,
                noise=noise,
                cond_fn=lambda x, t, push: th.full_like(x, push),
                model_kwargs={"push": push},
                noise_fn=lambda x, i: th.zeros_like(x),
            ).mean()
            for push in (-2.0, 0.0, 2.0)
        ]
        assert pushed[0] < pushed[1] - 0.01
        assert pushed[1] < pushed[2] - 0.01


def test_ddim_forth_and_back():
    """Encoding an image and decoding it again gives it back, nearly, with enough steps."""
    diffusion = make_diffusion("linear", 300)
    x = tensor("ddim/x", 2, 1, 4, 4).double() * 0.5

    def network(x, t):
        """Perfect where x_0 ~ N(0, 1/4), so that the code is about twice the image."""
        abar = th.from_numpy(diffusion.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
        return (1 - abar).sqrt() * x / (1 - 0.75 * abar)

    code = x
    for i in range(299):
        t = th.full((2,), i)
        code = diffusion.ddim_reverse_sample(network, code, t, clip_denoised=False)["sample"]
    back = code
    for i in reversed(range(1, 300)):
        t = th.full((2,), i)
        back = diffusion.ddim_sample(network, back, t, clip_denoised=False)["sample"]
    assert th.allclose(back, x, atol=0.02)
    assert th.allclose(code, 2 * x, atol=0.1)


def test_ddim_with_eta_one_is_ancestral():
    """Equation 16 of arXiv 2010.02502: the posterior variance, hence DDPM with the small one."""
    diffusion = make_diffusion("linear", 200, var_type=ModelVarType.FIXED_SMALL)
    toy, x, t = (
        toy_network(learn=False),
        tensor("eta/x", 3, 1, 4, 4).double(),
        th.tensor([5, 60, 199]),
    )
    noise = tensor("eta/n", 3, 1, 4, 4).double()
    kwargs = dict(clip_denoised=False, noise_fn=lambda x, t: noise)
    ancestral = diffusion.p_sample(toy, x, t, **kwargs)["sample"]
    implicit = diffusion.ddim_sample(toy, x, t, eta=1.0, **kwargs)["sample"]
    assert th.allclose(implicit, ancestral)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops(loop):
    diffusion, toy = make_diffusion("linear", 30), toy_network(learn=False)
    shape, seen = (2, 1, 4, 4), []

    def noise_fn(x, i):
        assert x.shape == shape
        seen.append(i)
        return th.full_like(x, 0.01 * i)

    noise = tensor("loop/x", *shape)
    kwargs = dict(noise=noise, noise_fn=noise_fn) | ({"eta": 0.5} if "ddim" in loop else {})
    image = getattr(diffusion, loop)(toy, shape, **kwargs)
    assert seen == list(reversed(range(30)))
    assert all(type(i) is int for i in seen)
    steps = list(getattr(diffusion, loop + "_progressive")(toy, shape, progress=True, **kwargs))
    assert len(steps) == 30
    assert th.equal(steps[-1]["sample"], image)
    assert th.equal(steps[-1]["pred_xstart"], image)
    assert not image.requires_grad


def test_loops_leave_the_callers_gradients_alone():
    diffusion, network = make_diffusion("linear", 30), th.nn.Conv2d(1, 1, 1)
    for loop in (diffusion.p_sample_loop_progressive, diffusion.ddim_sample_loop_progressive):
        for out in loop(lambda x, t: network(x), (1, 1, 2, 2)):
            assert th.is_grad_enabled()
            assert not out["sample"].requires_grad


def test_starts_where_the_model_is():
    diffusion = make_diffusion("linear", 30)
    model = th.nn.Conv2d(1, 1, 1, device="meta")
    network = lambda x, t: model(x)  # noqa: E731
    assert next(diffusion.p_sample_loop_progressive(network, (1, 1, 2, 2), device="cpu"), None)
    assert starting_noise(model, (1, 1, 2, 2)).device.type == "meta"
    assert starting_noise(network, (1, 1, 2, 2)).device.type == "cpu"


def test_bound_of_a_perfect_network_falls_with_knowledge():
    """The bound is additive and finite; a network that knows the image needs fewer bits."""
    diffusion = make_diffusion(
        "linear", 50, mean_type=ModelMeanType.START_X, var_type=ModelVarType.FIXED_SMALL
    )
    x_start = ((tensor("bpd/x0", 2, 1, 8, 8).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    seen = []

    def noise_fn(x, i):
        seen.append(i)
        return tensor(f"bpd/{i}", *x.shape)

    knows = diffusion.calc_bpd_loop(lambda x, t: x_start, x_start, noise_fn=noise_fn)
    guesses = diffusion.calc_bpd_loop(lambda x, t: 0 * x, x_start, noise_fn=noise_fn, progress=True)
    assert seen == 2 * list(reversed(range(50)))
    assert knows["vb"].shape == (2, 50)
    for bpd in (knows, guesses):
        assert th.allclose(bpd["total_bpd"], bpd["vb"].sum(1) + bpd["prior_bpd"])
    assert knows["total_bpd"].max() < guesses["total_bpd"].min()
    assert th.allclose(knows["xstart_mse"], th.zeros(2, 50))
    assert th.allclose(knows["vb"][:, :-1], th.zeros(2, 49), atol=1e-6)
