"""Configurations of networks and diffusion processes, and what is built from them.

Their fields are flags: torch is imported only to build something, so that a command parses its
flags at once.
"""

import argparse
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from guided_diffusion.networks.levels import (
    attention_factors,
    check_size,
    default_channel_mult,
    parse_channel_mult,
)
from guided_diffusion.runtime.command_line.flags import (
    NOT_GIVEN,
    Overrides,
    flag,
    from_flags,
    str2bool,
)
from guided_diffusion.runtime.errors import UserError

if TYPE_CHECKING:
    import torch as th

    from guided_diffusion.respace import SpacedDiffusion
    from guided_diffusion.unet import (
        EncoderUNetModel,
        SegmentationUNetModel,
        SuperResModel,
        UNetModel,
    )

NUM_CLASSES = 1000
NORMS = "norms"  # that of unet.py, which imports torch
# flags that may differ from those of the training: they change neither the network nor the process
FREE_FLAGS = ("dropout", "use_checkpoint", "use_fp16", "classifier_use_fp16", "timestep_respacing")

Config = TypeVar("Config", bound="NetworkConfig")
Network = TypeVar("Network", bound="th.nn.Module")
AnyUNetConfig = TypeVar("AnyUNetConfig", bound="UNetConfig")
UNet = TypeVar("UNet", bound="UNetModel")


def _parse_in_channels(text: str) -> int | object:
    if text not in ("1", "3", "auto"):
        raise argparse.ArgumentTypeError(f"expected 1, 3 or auto, not {text!r}")
    return NOT_GIVEN if text == "auto" else int(text)


def _parse_use_checkpoint(text: str) -> bool | str:
    return text if text == NORMS else str2bool(text)


@dataclasses.dataclass(frozen=True)
class NetworkConfig(ABC):
    """What the configuration of every network says, whatever the network is for."""

    TITLE = "Network"
    SECTION = "model"

    in_channels: int = flag(
        3,
        "1 for grey, 3 for colour; auto: infer from the checkpoint or the data",
        type=_parse_in_channels,
        metavar="1|3|auto",
        default_words="from the images",
        least=1,
        most=2**16,
    )
    num_classes: int = flag(
        NUM_CLASSES, "number of classes of the images, where they have any", least=1, most=10**6
    )

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Height and width of the images that are noised, pixels."""

    @property
    @abstractmethod
    def use_fp16(self) -> bool:
        """Whether the network runs in half precision on CUDA."""

    @property
    @abstractmethod
    def needs_classes(self) -> bool:
        """Whether every training image must have a class."""

    def with_explicit_channel_mult(self: Config) -> Config:
        """The same network, whatever the defaults of other versions are."""
        return self

    @abstractmethod
    def build(self) -> "th.nn.Module":
        """The network, float32, on the current default device."""


@dataclasses.dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The U-Net of a diffusion network but for its size; see UNetModel for what each field does."""

    num_channels: int = flag(128, "channels of the finest level", least=1, most=2**14, basic=True)
    num_res_blocks: int = flag(2, "residual blocks per level", least=1, most=100)
    num_heads: int = flag(
        4, "attention heads; ignored where num_head_channels is set", least=1, most=2**14
    )
    num_heads_upsample: int = flag(
        -1, "attention heads of the decoder; -1: num_heads", least=1, also=-1, most=2**14
    )
    num_head_channels: int = flag(
        -1, "channels per attention head; -1: num_heads decides", least=1, also=-1, most=2**14
    )
    attention_resolutions: str = flag("16,8", "feature map sizes with self-attention, pixels")
    channel_mult: str = flag(
        "",
        "channels of each level as multiples of num_channels, e.g. 0.5,1,2; '': by image size",
        metavar="LIST",
    )
    dropout: float = flag(
        0.0, "dropout probability in the residual blocks, 0 to 1", least=0, most=1
    )
    class_cond: bool = flag(False, "condition on the class, read from the file names")
    cond_drop_prob: float = flag(
        0.0,
        "probability of training on an image without its class, for classifier-free guidance;"
        " 0 to 1",
        least=0,
        most=1,
    )
    use_checkpoint: bool | str = flag(
        False,
        "recompute activations in the backward pass to save memory: True: all; norms: only those"
        " of the normalisation layers, which costs little time",
        type=_parse_use_checkpoint,
        switch=True,
    )
    use_scale_shift_norm: bool = flag(
        True, "the timestep embedding scales and shifts the normalised features, not only shifts"
    )
    resblock_updown: bool = flag(False, "resample in residual blocks instead of convolutions")
    use_fp16: bool = flag(False, "half precision on CUDA")
    use_new_attention_order: bool = flag(False, "split q, k, v before the heads")
    learn_sigma: bool = flag(False, "the network also predicts variances")

    @property
    def needs_classes(self) -> bool:
        return self.class_cond

    def mult(self) -> tuple[float, ...]:
        """Width of each level as a multiple of `num_channels`, finest first."""
        return parse_channel_mult(self.channel_mult) or default_channel_mult(self.image_size)

    def num_labels(self) -> int | None:
        """Rows of the network's class embedding; None where it is not class-conditional.

        Where classes are dropped in training there is an additional last row: "no class".
        """
        if not 0 <= self.cond_drop_prob <= 1:
            raise UserError(f"--cond_drop_prob {self.cond_drop_prob}: must be from 0 to 1")
        if self.cond_drop_prob and not self.class_cond:
            raise UserError("--cond_drop_prob drops classes: it needs --class_cond True")
        if not self.class_cond:
            return None
        return self.num_classes + (1 if self.cond_drop_prob else 0)

    def with_explicit_channel_mult(self: AnyUNetConfig) -> AnyUNetConfig:
        return dataclasses.replace(self, channel_mult=",".join(map(str, self.mult())))

    def network_arguments(self) -> dict[str, Any]:
        """Constructor arguments of UNetModel and its kin, but for the number of outputs.

        :raises UserError: if the fields do not make a network.
        """
        mult = self.mult()
        check_size(self.image_size, len(mult))
        return {
            "image_size": self.image_size,
            "in_channels": self.in_channels,
            "model_channels": self.num_channels,
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": attention_factors(
                self.attention_resolutions, self.image_size, len(mult)
            ),
            "dropout": self.dropout,
            "channel_mult": mult,
            "use_checkpoint": self.use_checkpoint,
            "use_fp16": self.use_fp16,
            "num_heads": self.num_heads,
            "num_head_channels": self.num_head_channels,
            "num_heads_upsample": self.num_heads_upsample,
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "resblock_updown": self.resblock_updown,
            "use_new_attention_order": self.use_new_attention_order,
        }

    def build_as(self, network: type[UNet], **arguments: Any) -> UNet:
        """The network as a subclass of UNetModel.

        :param arguments: of its constructor, beyond or in place of an image network's.
        :raises UserError: if the fields do not make a network.
        """
        channels = arguments.get("in_channels", self.in_channels)
        defaults = {
            "out_channels": channels * (2 if self.learn_sigma else 1),
            "num_classes": self.num_labels(),
            **self.network_arguments(),
        }
        return _construct(network, **{**defaults, **arguments})


@dataclasses.dataclass(frozen=True)
class ModelConfig(UNetConfig):
    """The diffusion network; see UNetModel for what each field does."""

    image_size: int = flag(
        64,
        "height and width of the images, pixels; a multiple of 2^(levels - 1)",
        least=1,
        most=2**16,
        basic=True,
    )

    def build(self) -> "UNetModel":
        """The diffusion network."""
        from guided_diffusion.unet import UNetModel

        return self.build_as(UNetModel)

    def build_segmentation(
        self, classes: int, depth: int | None, timestep: float
    ) -> "SegmentationUNetModel":
        """The segmentation network of the same architecture, without the class condition."""
        from guided_diffusion.unet import SegmentationUNetModel

        return _construct(
            SegmentationUNetModel,
            out_channels=classes,
            depth=depth,
            timestep=timestep,
            **self.network_arguments(),
        )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process; see `create_gaussian_diffusion`."""

    TITLE = "Diffusion process"
    SECTION = "diffusion"

    learn_sigma: bool = flag(False, "the network also predicts variances")
    diffusion_steps: int = flag(
        1000, "number of diffusion timesteps", least=1, most=10**5, basic=True
    )
    noise_schedule: str = flag("linear", "noise schedule", choices=("linear", "cosine"), basic=True)
    timestep_respacing: str = flag(
        "", "timesteps to use, e.g. 250, ddim50, 10,15,20; '': all", metavar="STEPS"
    )
    use_kl: bool = flag(False, "train on the variational bound instead of the squared error")
    predict_xstart: bool = flag(False, "predict the clean image instead of the noise")
    rescale_timesteps: bool = flag(False, "scale the timesteps that the network sees to 0..1000")
    rescale_learned_sigmas: bool = flag(
        False,
        "with learn_sigma: weight the variational term by diffusion_steps/1000, the paper's weight"
        " (arXiv 2102.09672, equation 16)",
    )

    def build(self) -> "SpacedDiffusion":
        """The diffusion process."""
        from guided_diffusion.networks.process import create_gaussian_diffusion

        settings = dataclasses.asdict(self)
        return create_gaussian_diffusion(steps=settings.pop("diffusion_steps"), **settings)


def _construct(network: type[Network], **arguments: Any) -> Network:
    """Construct a network.

    :raises UserError: for what the network refuses, since flags chose it.
    """
    try:
        return network(**arguments)
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class SuperResConfig(UNetConfig):
    """The super-resolution network; see SuperResModel."""

    large_size: int = flag(
        256, "height and width of the result, pixels", least=1, most=2**16, basic=True
    )
    small_size: int = flag(
        64, "height and width of the low-resolution image, pixels", least=1, most=2**16, basic=True
    )

    def __post_init__(self) -> None:
        if not 0 < self.small_size <= self.large_size:
            raise UserError(
                f"--small_size {self.small_size} and --large_size {self.large_size}: the small"
                " images must be at least 1 pixel and no larger than the large ones"
            )

    @property
    def image_size(self) -> int:
        return self.large_size

    def mult(self) -> tuple[float, ...]:
        """From 256 pixels on, the six levels of the published upsamplers."""
        return parse_channel_mult(self.channel_mult) or default_channel_mult(
            min(self.large_size, 256)
        )

    def build(self) -> "SuperResModel":
        """The diffusion network."""
        from guided_diffusion.unet import SuperResModel

        return self.build_as(SuperResModel)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(NetworkConfig):
    """The classifier of noised images (arXiv 2105.05233, section 4)."""

    TITLE = "Classifier"

    image_size: int = flag(
        64, "height and width of the images, pixels", least=1, most=2**16, basic=True
    )
    classifier_use_fp16: bool = flag(False, "half precision on CUDA")
    classifier_width: int = flag(
        128, "channels of the finest level of the classifier", least=1, most=2**14, basic=True
    )
    classifier_depth: int = flag(2, "residual blocks per level", least=1, most=100)
    classifier_attention_resolutions: str = flag(
        "32,16,8", "feature map sizes with self-attention, pixels"
    )
    classifier_use_scale_shift_norm: bool = flag(
        True, "the timestep embedding scales and shifts the normalised features, not only shifts"
    )
    classifier_resblock_updown: bool = flag(
        True, "resample in residual blocks instead of convolutions"
    )
    classifier_pool: str = flag(
        "attention", "adaptive, attention, spatial or spatial_v2", metavar="NAME"
    )

    @property
    def use_fp16(self) -> bool:
        return self.classifier_use_fp16

    @property
    def needs_classes(self) -> bool:
        return True

    def network_arguments(self) -> dict[str, Any]:
        """Constructor arguments of EncoderUNetModel.

        :raises UserError: if the fields do not make a network.
        """
        mult = default_channel_mult(self.image_size)
        check_size(self.image_size, len(mult))
        return {
            "image_size": self.image_size,
            "in_channels": self.in_channels,
            "model_channels": self.classifier_width,
            "out_channels": self.num_classes,
            "num_res_blocks": self.classifier_depth,
            "attention_resolutions": attention_factors(
                self.classifier_attention_resolutions, self.image_size, len(mult)
            ),
            "channel_mult": mult,
            "use_fp16": self.classifier_use_fp16,
            "num_head_channels": 64,
            "use_scale_shift_norm": self.classifier_use_scale_shift_norm,
            "resblock_updown": self.classifier_resblock_updown,
            "pool": self.classifier_pool,
        }

    def build(self) -> "EncoderUNetModel":
        """The classifier."""
        from guided_diffusion.unet import EncoderUNetModel

        return _construct(EncoderUNetModel, **self.network_arguments())


def check_flags(
    overrides: Overrides,
    stored: Any,
    source: str,
    free: Sequence[str] = ("image_size", *FREE_FLAGS),
) -> None:
    """Refuse flags that contradict a checkpoint's configuration.

    :param overrides: the flags on the command line.
    :param stored: the checkpoint's configuration, a dataclass.
    :param source: where it was read, for the message.
    :param free: fields that may differ.
    :raises UserError: naming the flag and both values.
    """
    fixed = {name: value for name, value in overrides.items() if name not in free}
    asked = from_flags(type(stored), fixed, stored)
    for f in dataclasses.fields(stored):
        if f.name in fixed and _comparable(asked, f.name) != _comparable(stored, f.name):
            raise UserError(
                f"--{f.name} {overrides[f.name]} contradicts {source}, which says"
                f" {getattr(stored, f.name)!r}: omit the flag, its value is read from there"
            )


def _comparable(config: Any, name: str) -> Any:
    """A field's value such that equal networks compare equal, however it is spelt."""
    if isinstance(config, UNetConfig):
        if name == "channel_mult":
            return config.mult()
        if name == "attention_resolutions":
            size, levels = config.image_size, len(config.mult())
            return set(attention_factors(config.attention_resolutions, size, levels))
        if name == "num_heads" and config.num_head_channels != -1:
            return None
        if name == "num_classes" and not config.class_cond:
            return None
    return getattr(config, name)
