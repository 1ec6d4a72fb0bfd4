"""Flags, configurations and the networks and diffusions built from them.

The functions that guided-diffusion has are thin views of ModelConfig and DiffusionConfig.
"""

import dataclasses
from typing import Any

from .networks.config import (  # noqa: F401 - create_gaussian_diffusion is part of the surface
    NUM_CLASSES,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SuperResConfig,
    create_gaussian_diffusion,
)
from .respace import SpacedDiffusion
from .runtime.flags import (  # noqa: F401 - names of this module in the original too
    add_dict_to_argparser,
    args_to_dict,
    from_mapping,
    str2bool,
)
from .unet import EncoderUNetModel, SuperResModel, UNetModel


def _defaults(*configs: type) -> dict[str, Any]:
    return {f.name: f.default for config in configs for f in dataclasses.fields(config)}


def diffusion_defaults() -> dict[str, Any]:
    """Flags of the diffusion process and their defaults."""
    return _defaults(DiffusionConfig)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the network and of the diffusion process and their defaults."""
    return _defaults(ModelConfig, DiffusionConfig)


def classifier_defaults() -> dict[str, Any]:
    """Flags of the classifier and their defaults, but for `in_channels` and `num_classes`, which
    it shares with the network that it guides."""
    shared = ("in_channels", "num_classes")
    return {k: v for k, v in _defaults(ClassifierConfig).items() if k not in shared}


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the classifier and of its diffusion process and their defaults."""
    return _defaults(ClassifierConfig, DiffusionConfig)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the super-resolution network and its diffusion process and their defaults."""
    unknown = ("image_size", "channel_mult", "use_new_attention_order")
    defaults = _defaults(SuperResConfig, DiffusionConfig)
    return {name: default for name, default in defaults.items() if name not in unknown}


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    channel_mult,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    use_new_attention_order,
    in_channels=3,
    num_classes=NUM_CLASSES,
    cond_drop_prob=0.0,
) -> tuple[UNetModel, SpacedDiffusion]:
    """The network and the diffusion process that ModelConfig and DiffusionConfig describe."""
    values = locals()
    return from_mapping(ModelConfig, values).build(), from_mapping(DiffusionConfig, values).build()


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    channel_mult="",
    learn_sigma=False,
    class_cond=False,
    use_checkpoint=False,
    attention_resolutions="16",
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    dropout=0,
    resblock_updown=False,
    use_fp16=False,
    use_new_attention_order=False,
    in_channels=3,
    num_classes=NUM_CLASSES,
    cond_drop_prob=0.0,
) -> UNetModel:
    """The network that ModelConfig describes."""
    return ModelConfig(**locals()).build()


def create_classifier_and_diffusion(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    learn_sigma,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    in_channels=3,
    num_classes=NUM_CLASSES,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A classifier of noised images and the diffusion process that noises them."""
    values = locals()
    return from_mapping(ClassifierConfig, values).build(), from_mapping(
        DiffusionConfig, values
    ).build()


def create_classifier(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    in_channels=3,
    num_classes=NUM_CLASSES,
) -> EncoderUNetModel:
    """The classifier that ClassifierConfig describes."""
    return ClassifierConfig(**locals()).build()


def sr_create_model_and_diffusion(
    large_size,
    small_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    in_channels=3,
    num_classes=NUM_CLASSES,
    cond_drop_prob=0.0,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """A super-resolution network and its diffusion process."""
    values = locals()
    return from_mapping(SuperResConfig, values).build(), from_mapping(
        DiffusionConfig, values
    ).build()


def sr_create_model(
    large_size,
    small_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
    resblock_updown,
    use_fp16,
    in_channels=3,
    num_classes=NUM_CLASSES,
    cond_drop_prob=0.0,
) -> SuperResModel:
    """The network that SuperResConfig describes."""
    return SuperResConfig(**locals()).build()
