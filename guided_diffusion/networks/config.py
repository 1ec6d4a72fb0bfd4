"""Configurations of networks and diffusion processes, and what is built from them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import NOT_GIVEN, flag, from_flags, str2bool
from guided_diffusion.unet import (
    NORMS,
    EncoderUNetModel,
    SegmentationUNetModel,
    SuperResModel,
    UNetModel,
)

NUM_CLASSES = 1000


def _channels(text: str) -> int | object:
    """Parse --in_channels."""
    if text not in ("1", "3", "auto"):
        raise ValueError(text)
    return NOT_GIVEN if text == "auto" else int(text)


def _recompute(text: str) -> bool | str:
    """Argument of --use_checkpoint."""
    return text if text == NORMS else str2bool(text)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a diffusion network; see UNetModel for what each field does."""

    TITLE = "Network"

    image_size: int = flag(64, "height and width of the images, pixels; 2^(levels-1) divides it")
    in_channels: int = flag(
        3,
        "1 for grey, 3 for colour, auto to infer it from the checkpoint or the images",
        type=_channels,
        metavar="1|3|auto",
    )
    num_channels: int = flag(128, "width of the finest level, channels")
    num_res_blocks: int = flag(2, "residual blocks a level")
    num_heads: int = flag(4, "attention heads, where num_head_channels is -1")
    num_heads_upsample: int = flag(-1, "heads of the expanding half; -1: num_heads")
    num_head_channels: int = flag(-1, "channels an attention head; -1: num_heads decides")
    attention_resolutions: str = flag("16,8", "sizes of feature map, pixels, that have attention")
    channel_mult: str = flag("", "width of each level in num_channels, e.g. 0.5,1,2; '': by size")
    dropout: float = flag(0.0, "share of activations dropped in the residual blocks, 0 to 1")
    class_cond: bool = flag(False, "condition on the class, read from the file names")
    num_classes: int = flag(NUM_CLASSES, "number of classes of a class-conditional network")
    cond_drop_prob: float = flag(
        0.0, "share of images trained on without their class, for guidance; 0 to 1"
    )
    use_checkpoint: bool | str = flag(
        False,
        "recompute activations in the backward pass, for less memory: True for all, norms for those"
        " of norms alone, which takes little time",
        type=_recompute,
        nargs="?",
        const=True,
        metavar="True|False|norms",
    )
    use_scale_shift_norm: bool = flag(True, "timesteps scale and shift the norms, not only add")
    resblock_updown: bool = flag(False, "resample inside residual blocks")
    use_fp16: bool = flag(False, "half precision, on CUDA")
    use_new_attention_order: bool = flag(False, "split q, k, v before the heads")
    learn_sigma: bool = flag(False, "the network also predicts variances")

    def mult(self) -> tuple[float, ...]:
        """Width of each level as a multiple of `num_channels`, finest first."""
        return parse_channel_mult(self.channel_mult) or default_channel_mult(self.image_size)

    def num_labels(self) -> int | None:
        """Rows of the network's table of classes; None where it is not class-conditional.

        Where classes are dropped in training there is one row more, the last: "no class".
        """
        if not 0 <= self.cond_drop_prob <= 1:
            raise UserError(f"--cond_drop_prob {self.cond_drop_prob}: must be from 0 to 1")
        if self.cond_drop_prob and not self.class_cond:
            raise UserError("--cond_drop_prob drops classes: it needs --class_cond True")
        if not self.class_cond:
            return None
        return self.num_classes + (1 if self.cond_drop_prob else 0)

    def with_explicit_channel_mult(self) -> "ModelConfig":
        """The same network, whatever the defaults of other versions are."""
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

    def build(self) -> UNetModel:
        """The diffusion network."""
        return self._build(UNetModel)

    def _build(self, network: type[UNetModel], **more: Any) -> UNetModel:
        """:param more: further arguments, and those that are not as for an image network."""
        outputs = more.get("in_channels", self.in_channels) * (2 if self.learn_sigma else 1)
        arguments = {
            "out_channels": outputs,
            "num_classes": self.num_labels(),
            **self.network_arguments(),
        }
        return _refusing(network, **{**arguments, **more})

    def build_segmentation(
        self, classes: int, depth: int | None, timestep: float
    ) -> SegmentationUNetModel:
        """The segmentation network of the same architecture, without the class condition."""
        return _refusing(
            SegmentationUNetModel,
            out_channels=classes,
            depth=depth,
            timestep=timestep,
            **self.network_arguments(),
        )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """All that is needed to build a diffusion process; see `create_gaussian_diffusion`."""

    TITLE = "Diffusion process"

    learn_sigma: bool = flag(False, "the network also predicts variances")
    diffusion_steps: int = flag(1000, "timesteps of the diffusion")
    noise_schedule: str = flag("linear", "linear or cosine", choices=("linear", "cosine"))
    timestep_respacing: str = flag("", "timesteps used, e.g. 250, ddim50, 10,15,20; '': all")
    use_kl: bool = flag(False, "train on the variational bound")
    predict_xstart: bool = flag(False, "predict the clean image instead of the noise")
    rescale_timesteps: bool = flag(False, "the network sees timesteps scaled to 0..1000")
    rescale_learned_sigmas: bool = flag(
        False, "with learn_sigma: weigh the variational term 1/1000"
    )

    def build(self) -> SpacedDiffusion:
        """The diffusion process."""
        settings = dataclasses.asdict(self)
        return create_gaussian_diffusion(steps=settings.pop("diffusion_steps"), **settings)


def _refusing(network: type, **kwargs: Any) -> Any:
    """Build a network; what it refuses is the user's choice of flags."""
    try:
        return network(**kwargs)
    except ValueError as error:
        raise UserError(str(error)) from error


def default_channel_mult(image_size: int) -> tuple[float, ...]:
    """The widths of arXiv 2105.05233 for the known size that is nearest (as a ratio)."""
    known = {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
        32: (1, 2, 2, 2),
    }
    return known[min(known, key=lambda size: abs(math.log(size / image_size)))]


def parse_channel_mult(text: str | Sequence[float]) -> tuple[float, ...]:
    """`"0.5,1,2"` to `(0.5, 1, 2)`; empty for the default."""
    parts = text.split(",") if isinstance(text, str) else text
    try:
        values = tuple(float(part) for part in parts if str(part).strip())
    except ValueError:
        raise UserError(f"--channel_mult {text}: expected numbers like 0.5,1,2") from None
    if any(value <= 0 for value in values):
        raise UserError(f"--channel_mult {text}: widths must be above zero")
    return tuple(int(value) if value == int(value) else value for value in values)


def check_size(image_size: int, levels: int) -> None:
    """Refuse a size that cannot be halved `levels - 1` times, naming the nearest that can."""
    multiple = 2 ** (levels - 1)
    if image_size < 1 or image_size % multiple:
        below = max(image_size // multiple, 1) * multiple
        raise UserError(
            f"--image_size {image_size}: a network of {levels} levels needs a multiple of"
            f" {multiple}, such as {below} or {below + multiple}; or give fewer levels with"
            " --channel_mult"
        )


def attention_factors(resolutions: str, image_size: int, levels: int) -> tuple[int, ...]:
    """Sizes of feature map that have attention, as factors of downsampling.

    Sizes that the network does not have, such as 32 in one for 224 pixels (224, 112, 56, 28, ...),
    stand for the nearest that it has; sizes beyond its range are left out, as in the original.
    """
    try:
        sizes = [int(part) for part in str(resolutions).split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"--attention_resolutions {resolutions}: expected sizes like 32,16,8"
        ) from None
    factors = []
    for size in sizes:
        if size < 1:
            raise UserError(f"--attention_resolutions {resolutions}: sizes must be above zero")
        level = round(math.log2(image_size / size))
        if 0 <= level < levels and 2**level not in factors:
            factors.append(2**level)
    return tuple(factors)


@dataclasses.dataclass(frozen=True)
class SuperResConfig(ModelConfig):
    """All that is needed to build a super-resolution network; see SuperResModel."""

    image_size: int = dataclasses.field(init=False, default=256)
    large_size: int = flag(256, "height and width of the result, pixels")
    small_size: int = flag(64, "height and width of what is sharpened, pixels")

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", self.large_size)
        if not 0 < self.small_size <= self.large_size:
            raise UserError(
                f"--small_size {self.small_size} and --large_size {self.large_size}: the small"
                " images must be at least 1 pixel and no larger than the large ones"
            )

    def mult(self) -> tuple[float, ...]:
        """From 256 pixels on, the six levels of the published upsamplers."""
        return parse_channel_mult(self.channel_mult) or default_channel_mult(
            min(self.large_size, 256)
        )

    def build(self) -> SuperResModel:
        """The diffusion network."""
        return self._build(SuperResModel)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """All that is needed to build a classifier of noised images (arXiv 2105.05233, section 4)."""

    TITLE = "Classifier"

    image_size: int = flag(64, "height and width of the images, pixels")
    in_channels: int = flag(
        3,
        "1 for grey, 3 for colour, auto to infer it from the checkpoint or the images",
        type=_channels,
        metavar="1|3|auto",
    )
    num_classes: int = flag(NUM_CLASSES, "number of classes that the classifier tells apart")
    classifier_use_fp16: bool = flag(False, "half precision, on CUDA")
    classifier_width: int = flag(128, "width of the classifier's finest level, channels")
    classifier_depth: int = flag(2, "residual blocks a level")
    classifier_attention_resolutions: str = flag("32,16,8", "sizes, pixels, that have attention")
    classifier_use_scale_shift_norm: bool = flag(True, "timesteps scale and shift the norms")
    classifier_resblock_updown: bool = flag(True, "resample inside residual blocks")
    classifier_pool: str = flag("attention", "adaptive, attention, spatial or spatial_v2")

    # what training asks of every network's configuration
    class_cond = True
    cond_drop_prob = 0.0

    @property
    def use_fp16(self) -> bool:
        return self.classifier_use_fp16

    def with_explicit_channel_mult(self) -> "ClassifierConfig":
        return self

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

    def build(self) -> EncoderUNetModel:
        """The classifier."""
        return _refusing(EncoderUNetModel, **self.network_arguments())


def create_gaussian_diffusion(
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=False,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
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


# what a user may change between runs without changing the network or the process
_FREE = ("image_size", "dropout", "use_checkpoint", "use_fp16", "timestep_respacing")


def check_flags(
    overrides: Mapping[str, Any], stored: Any, source: str, free: Sequence[str] = _FREE
) -> None:
    """Refuse flags that contradict a checkpoint's configuration.

    :param overrides: the given flags.
    :param stored: the checkpoint's configuration, a dataclass.
    :param source: where it stands, for the message.
    :param free: fields that may differ.
    :raises UserError: naming the flag and both values.
    """
    asked = from_flags(type(stored), {k: v for k, v in overrides.items() if k not in free}, stored)
    for f in dataclasses.fields(stored):
        if f.name in free or f.name not in overrides:
            continue
        wanted, there = _canonical(asked, f.name), _canonical(stored, f.name)
        if wanted != there:
            raise UserError(
                f"--{f.name} {overrides[f.name]} contradicts {source}, which says"
                f" {getattr(stored, f.name)!r}: leave the flag out, it is read from there"
            )


def _canonical(config: Any, name: str) -> Any:
    """A field's value in the one spelling that can be compared."""
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


def network_timestep(timestep: float, diffusion: DiffusionConfig) -> float:
    """A timestep of the diffusion in the units its network was trained with."""
    return gd.network_timesteps(timestep, diffusion.diffusion_steps, diffusion.rescale_timesteps)
