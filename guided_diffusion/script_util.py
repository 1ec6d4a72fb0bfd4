"""Flags, configurations and the networks and diffusions built from them.

The functions that guided-diffusion has are thin views of ModelConfig and DiffusionConfig.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .networks.config import (
    NUM_CLASSES,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SuperResConfig,
)
from .networks.process import create_gaussian_diffusion  # noqa: F401 - public here in the original
from .respace import SpacedDiffusion
from .runtime.command_line.flags import (  # noqa: F401 - names of this module in the original too
    add_dict_to_argparser,
    args_to_dict,
    from_mapping,
    str2bool,
)
from .unet import EncoderUNetModel, SuperResModel, UNetModel


def _defaults(*configs: type) -> dict[str, Any]:
    return {f.name: f.default for config in configs for f in dataclasses.fields(config)}


def _diffusion(values: Mapping[str, Any]) -> SpacedDiffusion:
    return from_mapping(DiffusionConfig, values).build()


def diffusion_defaults() -> dict[str, Any]:
    """Flags of the diffusion process and their defaults."""
    return _defaults(DiffusionConfig)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the network and of the diffusion process and their defaults."""
    return _defaults(ModelConfig, DiffusionConfig)


def classifier_defaults() -> dict[str, Any]:
    """Flags of the classifier and their defaults, without `in_channels` and `num_classes`, which
    it shares with the network that it guides."""
    shared = ("in_channels", "num_classes")
    return {k: v for k, v in _defaults(ClassifierConfig).items() if k not in shared}


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the classifier and of its diffusion process and their defaults."""
    return _defaults(ClassifierConfig, DiffusionConfig)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the super-resolution network and its diffusion process and their defaults."""
    unknown = ("channel_mult", "use_new_attention_order")
    defaults = _defaults(SuperResConfig, DiffusionConfig)
    return {name: default for name, default in defaults.items() if name not in unknown}


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool | str,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    in_channels: int = 3,
    num_classes: int = NUM_CLASSES,
    cond_drop_prob: float = 0.0,
) -> tuple[UNetModel, SpacedDiffusion]:
    """The network and the diffusion process that ModelConfig and DiffusionConfig describe."""
    return from_mapping(ModelConfig, locals()).build(), _diffusion(locals())


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool | str = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    in_channels: int = 3,
    num_classes: int = NUM_CLASSES,
    cond_drop_prob: float = 0.0,
) -> UNetModel:
    """The network that ModelConfig describes."""
    return ModelConfig(**locals()).build()


def create_classifier_and_diffusion(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    learn_sigma: bool,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    in_channels: int = 3,
    num_classes: int = NUM_CLASSES,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A classifier of noised images and the diffusion process that noises them."""
    return from_mapping(ClassifierConfig, locals()).build(), _diffusion(locals())


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    in_channels: int = 3,
    num_classes: int = NUM_CLASSES,
) -> EncoderUNetModel:
    """The classifier that ClassifierConfig describes."""
    return ClassifierConfig(**locals()).build()


def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool | str,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    in_channels: int = 3,
    num_classes: int = NUM_CLASSES,
    cond_drop_prob: float = 0.0,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """A super-resolution network and its diffusion process."""
    return from_mapping(SuperResConfig, locals()).build(), _diffusion(locals())


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool | str,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
    in_channels: int = 3,
    num_classes: int = NUM_CLASSES,
    cond_drop_prob: float = 0.0,
) -> SuperResModel:
    """The network that SuperResConfig describes."""
    return SuperResConfig(**locals()).build()
