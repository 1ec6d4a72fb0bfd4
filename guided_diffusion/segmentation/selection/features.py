"""What a pretrained diffusion network sees in each radiograph, as one vector.

Activations of its decoder tell parts of the body apart (arXiv 2112.03126). Their averages over the
fields of a coarse grid say which parts lie where: radiographs that look alike to the network have
vectors that are near each other.
"""

from dataclasses import replace
from typing import cast

import numpy as np
import torch as th
import torch.nn.functional as F

from guided_diffusion.images.reading import ReadingConfig, normalize
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.networks.trained import Trained
from guided_diffusion.segmentation.networks.decoder_features import decoder_features
from guided_diffusion.unet import UNetModel

# fields along each side of the image
_GRID = 4
# the second quarter of the decoder's blocks: deep enough to tell what is shown, fine enough to tell
# where
_FIRST, _LAST = 1 / 4, 1 / 2
# as for segmentation, images are taken as almost free of noise
_TIMESTEP = 1
_LARGEST = 6e4  # of float16


class Encoder:
    """Maps radiographs to vectors, in float32 whatever the device: the choice is the same on all.

    note: what to tell the user about the network, "" for nothing.
    """

    def __init__(self, trained: Trained[ModelConfig], device: th.device | str):
        weights, self.note = trained.without_classes()
        model = replace(trained.model, class_cond=False, cond_drop_prob=0.0, use_fp16=False)
        self.device = th.device(device)
        network = replace(trained, model=model, weights=weights).network(self.device)
        self.network = cast(UNetModel, network)
        self.reading: ReadingConfig = trained.reading
        count = len(self.network.output_blocks)
        first = round(_FIRST * count)
        self.blocks = range(first, max(first + 1, round(_LAST * count)))
        self.timestep = network_timestep(_TIMESTEP, trained.diffusion)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Vectors, float16 `[N x D]`, of uint8 images `[N x H x W x C]`."""
        batch = normalize(images).to(self.device)
        with th.inference_mode():
            maps = decoder_features(self.network, self.blocks, batch, self.timestep)
            pooled = [F.adaptive_avg_pool2d(one.float(), _GRID).flatten(1) for one in maps]
            return th.cat(pooled, 1).clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
