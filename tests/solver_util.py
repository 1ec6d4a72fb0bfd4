"""Running the few-step samplers with recorded noise."""

from golden_util import tensor

from guided_diffusion.sampling.solvers import SamplerOptions, sample

DETERMINISTIC = ["ddim", "dpm++2m", "heun", "unipc"]


def run(name, diffusion, model, noise, steps, **options):
    """Sample from x_T = noise."""
    options = SamplerOptions(**options)
    return sample(name, diffusion, model, noise.shape, steps=steps, noise=noise, options=options)


def step_noise(x, timestep):
    """Recorded noise like x for a timestep."""
    return tensor(f"solvers/{timestep}", *x.shape).to(x.dtype)
