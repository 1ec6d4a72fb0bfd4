"""Diffusion processes, from settings by name."""

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.respace import SpacedDiffusion, space_timesteps


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str = "",
) -> SpacedDiffusion:
    """A diffusion process.

    :param steps: timesteps of the full process.
    :param learn_sigma: the network predicts variances (arXiv 2102.09672, section 3.1).
    :param sigma_small: of fixed variances, the lower bound instead of the upper.
    :param noise_schedule: "linear" or "cosine".
    :param use_kl: train on the variational bound instead of the squared error.
    :param predict_xstart: the network predicts the clean image instead of the noise.
    :param rescale_timesteps: the network sees timesteps scaled to a process of 1000.
    :param rescale_learned_sigmas: weigh the variational term so that it does not dominate.
    :param timestep_respacing: see `space_timesteps`; empty for all timesteps.
    """
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    if learn_sigma:
        variance = gd.ModelVarType.LEARNED_RANGE
    else:
        variance = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=variance,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def network_timestep(timestep: float, diffusion: DiffusionConfig) -> float:
    """A timestep of the diffusion in the units its network was trained with."""
    return gd.network_timesteps(timestep, diffusion.diffusion_steps, diffusion.rescale_timesteps)
