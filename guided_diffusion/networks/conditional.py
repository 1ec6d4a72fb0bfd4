"""Configurations of the diffusion networks that are conditioned on an image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.errors import UserError

if TYPE_CHECKING:
    import torch as th

    from guided_diffusion.unet import ConditionalUNetModel


@dataclass(frozen=True)
class GuidedConfig(ModelConfig):
    """The network, and the masks that may guide it.

    The condition has one channel per class except the background: 1 inside the class, 0 elsewhere.
    A class of which nothing is known is a channel of zeros.
    """

    segmentation_guided: bool = flag(False, "condition on the masks in --seg_dir", basic=True)
    num_segmentation_classes: int = flag(
        0, "classes of the masks, including the background", least=0, most=256
    )
    use_ablated_segmentations: bool = flag(
        False,
        "drop classes from half of the masks, so that masks without some or all of them can guide",
    )

    def build(self) -> "ConditionalUNetModel":
        """The diffusion network."""
        from guided_diffusion.unet import ConditionalUNetModel

        check_classes(self.num_segmentation_classes)
        return self.build_as(ConditionalUNetModel, cond_channels=self.num_segmentation_classes - 1)


@dataclass(frozen=True)
class MaskDiffusionConfig(ModelConfig):
    """The network that samples masks, conditioned on the radiograph.

    A mask is diffused as one channel per class, 1 inside the class and -1 elsewhere; two classes
    need only the second's channel. `in_channels` counts those of the radiograph.
    """

    num_segmentation_classes: int = flag(
        0,
        "classes, including the background; 0: as many as the class table or the masks have",
        "--out_channels",
        least=0,
        most=256,
        basic=True,
    )

    @property
    def mask_channels(self) -> int:
        """Channels of a mask as it is diffused."""
        return 1 if self.num_segmentation_classes == 2 else self.num_segmentation_classes

    def build(self) -> "ConditionalUNetModel":
        """The diffusion network."""
        from guided_diffusion.unet import ConditionalUNetModel

        check_classes(self.num_segmentation_classes)
        return self.build_as(
            ConditionalUNetModel, in_channels=self.mask_channels, cond_channels=self.in_channels
        )


def check_classes(number: int) -> None:
    """:raises UserError: for a number of classes that no mask can have."""
    if not 2 <= number <= 255:
        raise UserError(
            f"--num_segmentation_classes {number}: count the classes of the masks, including the"
            " background, from 2 to 255"
        )


def one_hot(masks: "th.Tensor", classes: int) -> "th.Tensor":
    """Class indices, uint8 `[N x H x W]`, to 0 or 1, uint8 `[N x classes - 1 x H x W]`.

    Neither the background nor IGNORE has a channel.
    """
    import torch as th

    numbers = th.arange(1, classes, dtype=masks.dtype, device=masks.device)
    return (masks[:, None] == numbers[:, None, None]).to(th.uint8)
