"""What config.json says of the networks that an image conditions."""

from dataclasses import dataclass

import torch as th

from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.unet import ConditionalUNetModel


@dataclass(frozen=True)
class GuidedConfig(ModelConfig):
    """The network, and the class maps that may guide it.

    The condition has a channel for each class but the background: 1 where the class is, else 0.
    Where nothing is known of the classes all channels are 0.
    """

    segmentation_guided: bool = flag(False, "condition on the class maps in --seg_dir")
    num_segmentation_classes: int = flag(0, "classes of the class maps, background counted")
    use_ablated_segmentations: bool = flag(
        False, "drop classes from half the class maps, so that maps that lack some, or all, guide"
    )

    def build(self) -> ConditionalUNetModel:
        """The diffusion network."""
        check_classes(self.num_segmentation_classes)
        return self._build(ConditionalUNetModel, cond_channels=self.num_segmentation_classes - 1)


@dataclass(frozen=True)
class MaskDiffusionConfig(ModelConfig):
    """The network that draws class maps; the radiograph is its condition.

    The class map is diffused as one channel a class, 1 where the class is and -1 elsewhere; of two
    classes the second's channel is enough. `in_channels` counts those of the radiograph.
    """

    num_segmentation_classes: int = flag(
        0, "classes, background counted; 0: as the categories or masks have", "--out_channels"
    )

    @property
    def mask_channels(self) -> int:
        """Channels of a class map."""
        return 1 if self.num_segmentation_classes == 2 else self.num_segmentation_classes

    def build(self) -> ConditionalUNetModel:
        """The diffusion network."""
        check_classes(self.num_segmentation_classes)
        return self._build(
            ConditionalUNetModel, in_channels=self.mask_channels, cond_channels=self.in_channels
        )


def check_classes(number: int) -> None:
    """:raises UserError: for a number of classes that no masks have."""
    if not 2 <= number <= 255:
        raise UserError(
            f"--num_segmentation_classes {number}: count the classes of the masks, the background"
            " too, from 2 to 255"
        )


def one_hot(masks: th.Tensor, classes: int) -> th.Tensor:
    """Uint8 `[N x H x W]` of class indices to 0 or 1, uint8 `[N x classes - 1 x H x W]`.

    The background and what is no class (IGNORE) have no channel.
    """
    numbers = th.arange(1, classes, dtype=masks.dtype, device=masks.device)
    return (masks[:, None] == numbers[:, None, None]).to(th.uint8)
