"""Pretraining with features aligned with a pretrained encoder's (REPA, arXiv 2410.06940)."""

from typing import Any

import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.networks.alignment import AlignedNetwork, Targets, alignment_sites
from guided_diffusion.networks.config import UNetConfig
from guided_diffusion.networks.encoders import Encoder
from guided_diffusion.train_util import TrainLoop


def alignment(
    network: th.nn.Module, config: UNetConfig, encoder: Encoder, weight: float
) -> dict[str, Any]:
    """What AlignedLoop takes beyond TrainLoop.

    :param network: of this configuration, on its device.
    """
    targets = Targets(encoder, dist_util.dev())
    sites = alignment_sites(config)
    aligned = AlignedNetwork(network, sites, targets.width).to(dist_util.dev())
    names = " and ".join(site.name for site in sites)
    logger.log(f"aligning {names} with the encoder's features, weight {weight:g}")
    return {"wrapper": aligned, "targets": targets, "weight": weight}


class AlignedLoop(TrainLoop):
    """TrainLoop whose loss also counts how far the features are from the encoder's.

    As in the paper, at all noise levels alike.

    :param model: the network.
    :param wrapper: the network with its heads.
    :param targets: the encoder's features.
    :param weight: of the distance in the loss.
    """

    def __init__(self, *, wrapper: AlignedNetwork, targets: Targets, weight: float, **kwargs: Any):
        self.wrapper, self.targets, self.weight = wrapper, targets, weight
        super().__init__(wrapper=wrapper, **kwargs)

    def loss_terms(
        self,
        model: th.nn.Module,
        images: th.Tensor,
        ts: th.Tensor,
        kwargs: dict[str, th.Tensor],
        noise: th.Tensor,
    ) -> dict[str, th.Tensor]:
        """The diffusion's, and "align" `[N]`, from 0 to 2."""
        terms = super().loss_terms(model, images, ts, kwargs, noise)
        align = self.wrapper.distances(self.targets(images))
        return {**terms, "align": align, "loss": terms["loss"] + self.weight * align}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if not state["stepper"].get("beside"):
            logger.log("the run so far was not aligned: the heads start from random weights")
