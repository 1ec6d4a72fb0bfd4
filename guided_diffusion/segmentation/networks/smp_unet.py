"""A U-Net of segmentation_models_pytorch as a segmentation network: the baseline of many papers."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch as th

from guided_diffusion.networks import imagenet
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation.model_file import SegmentationConfig
from guided_diffusion.segmentation.networks.kind import Member, MemberOptions, single_member
from guided_diffusion.segmentation.networks.padding import crop_to, pad_to_multiple

# mean and standard deviation of red, green and blue, for images in [0, 1]
Statistics = tuple[Sequence[float], Sequence[float]]
# of ImageNet's training images, by which most pretrained encoders standardise
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# the encoder whose weights a package contains
LITE0 = f"tu-{imagenet.LITE0}"
# the encoder halves the size five times
_MULTIPLE = 32


class SmpUnet(th.nn.Module):
    """segmentation_models_pytorch's Unet for images in [-1, 1] of any size.

    :param encoder: one of the package's encoders, such as resnet34.
    :param encoder_weights: None for random ones, or a name that the package downloads ("imagenet");
        those of `LITE0` come from their own package if it is installed.
    :param statistics: by which images are standardised; None for the encoder's.
    """

    mean: th.Tensor
    deviation: th.Tensor

    def __init__(
        self,
        encoder: str,
        in_channels: int,
        classes: int,
        encoder_weights: str | None = None,
        statistics: Statistics | None = None,
    ):
        super().__init__()
        smp = _package()
        packaged = is_packaged(encoder, encoder_weights)
        named = None if packaged else encoder_weights
        try:
            self.network = smp.Unet(
                encoder, encoder_weights=named, in_channels=in_channels, classes=classes
            )
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise UserError(_reason(encoder, encoder_weights, error)) from error
        if packaged:
            self._load_encoder(imagenet.lite0_weights(), "imagenet")
        self.statistics = statistics or _statistics(smp, encoder, named)
        mean, deviation = map(th.tensor, self.statistics)
        if in_channels == 1:
            mean, deviation = mean.mean(0, keepdim=True), deviation.mean(0, keepdim=True)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("deviation", deviation[:, None, None], persistent=False)

    def forward(self, images: th.Tensor) -> th.Tensor:
        """`[N x in_channels x H x W]` to logits `[N x classes x H x W]`."""
        standard = ((images + 1) / 2 - self.mean) / self.deviation
        return crop_to(self.network(pad_to_multiple(standard, _MULTIPLE)), images)

    def load_encoder(self, path: str) -> None:
        """Load the encoder from a file: its state_dict, or that of a network which contains it.

        For grey images the first layer of a colour encoder is summed over its input channels.

        :raises UserError: if the file's tensors are not this encoder's.
        """
        state = checkpoint.load(path)
        state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
        self._load_encoder(state, path)

    def _load_encoder(self, state: Mapping[str, Any], source: str) -> None:
        own = self.network.encoder.state_dict()
        fitting = {}
        for name, tensor in state.items():
            name = name.removeprefix("network.").removeprefix("encoder.")
            name = name if name in own else f"model.{name}"  # what smp calls timm's networks
            if name not in own or not th.is_tensor(tensor):
                continue
            tensor = imagenet.fit_input(tensor, own[name])
            if tensor.shape == own[name].shape:
                fitting[name] = tensor
        missing = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
        if missing:
            raise UserError(
                f"--encoder_weights {source} lacks {len(missing)} of the {len(own)} tensors of this"
                f" encoder, or has them in another shape, such as {missing[0]}: name weights of the"
                " same --encoder"
            )
        self.network.encoder.load_state_dict(fitting, strict=False)


def is_packaged(encoder: str, weights: str | None) -> bool:
    """Whether a package that is installed contains these weights of the encoder."""
    return encoder == LITE0 and weights == "imagenet" and imagenet.installed()


def build(config: SegmentationConfig) -> SmpUnet:
    """The network of a model file of kind "smp", with random weights."""
    options = config.options
    statistics = options.get("mean", IMAGENET[0]), options.get("deviation", IMAGENET[1])
    return SmpUnet(
        options["encoder"], config.in_channels, len(config.categories), statistics=statistics
    )


def options_of(encoder: str, statistics: Statistics) -> dict[str, Any]:
    """What a model file says of the network; statistics only where they are not `IMAGENET`."""
    options: dict[str, Any] = {"encoder": encoder}
    if statistics != IMAGENET:
        options["mean"], options["deviation"] = map(list, statistics)
    return options


def members(model: SmpUnet, device: th.device, options: MemberOptions) -> list[Member]:
    """The network alone."""
    options.check("smp")
    return single_member(model, device, options)


class ExportCore(th.nn.Module):
    """The network without padding."""

    multiple = _MULTIPLE

    def __init__(self, model: SmpUnet):
        super().__init__()
        self.model = model

    def forward(self, images: th.Tensor) -> th.Tensor:
        return self.model.network(((images + 1) / 2 - self.model.mean) / self.model.deviation)


def _package() -> ModuleType:
    try:
        import segmentation_models_pytorch  # takes seconds to import
    except ImportError as error:
        raise UserError(
            "this network needs segmentation_models_pytorch: pip install"
            " segmentation-models-pytorch (or this package with its extra [baseline])"
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
    return segmentation_models_pytorch


def _statistics(smp: ModuleType, encoder: str, weights: str | None) -> Statistics:
    """The statistics of the images that an encoder's published weights were trained on.

    Those of smp's own encoders come with the weights that it downloads; without these they are not
    known, and taken to be ImageNet's.
    """
    known = f"tu-{encoder.removeprefix('timm-')}" if encoder.startswith("timm-") else encoder
    if weights is None and not known.startswith("tu-"):
        return IMAGENET
    with contextlib.suppress(ValueError, KeyError, RuntimeError, OSError):
        found = smp.encoders.get_preprocessing_params(known, weights or "imagenet")
        most = found["input_range"][1]
        return tuple(v / most for v in found["mean"]), tuple(v / most for v in found["std"])
    return IMAGENET


def _reason(encoder: str, weights: str | None, error: Exception) -> str:
    if weights is None or isinstance(error, KeyError):
        reason = str(error).strip("\"'").split("\n")[0][:300]
        return f"--encoder {encoder} --encoder_weights {weights or 'none'}: {reason}"
    return (
        f"--encoder_weights {weights}: cannot download the weights of {encoder}"
        f" ({type(error).__name__}); offline, give a file of the encoder's state_dict, or none, or"
        f" use --encoder {LITE0}, whose weights come with this package's extra [imagenet]"
    )
