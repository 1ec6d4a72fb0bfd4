"""Fine-tuning two kinds of network on the same masks, which then predict as one.

The networks differ in what they have learnt before: the diffusion network from radiographs, the
other from photographs. So they err in different places, and the mean of their probabilities is
better than either (measured in docs/label-efficiency.md).
"""

import dataclasses
import os

import torch as th

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks import imagenet
from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model, save_model
from guided_diffusion.segmentation.networks.union import join
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.loop import InitialNetwork
from guided_diffusion.segmentation.training.smp_network import smp_network
from guided_diffusion.segmentation.training.stages import Partner, Settings, Stage, StagedRun

# files of the two in the folder of the stages
_NETWORKS = ("diffusion.pth", "imagenet.pth")


def imagenet_partner(reading: ReadingConfig, categories: ClassTable, lr: float) -> Partner:
    """smp's U-Net with an encoder pretrained on ImageNet.

    :raises UserError: if its packages are not installed.
    """
    from guided_diffusion.segmentation.networks.smp_unet import LITE0

    if not imagenet.installed():
        raise UserError(f"--partner imagenet needs its weights: {imagenet.REMEDY}")
    config = SegmentationConfig(None, reading, categories)

    def build(settings: LearningConfig) -> InitialNetwork:
        th.manual_seed(settings.seed)
        return smp_network(config, LITE0, "imagenet", settings.head_lr_scale)

    return Partner(build, lr)


def partner_files(settings: LearningConfig) -> list[str]:
    """What the networks of a `PartnerRun` leave: of each the best, and what resuming needs."""
    paths = [os.path.join(settings.stages_folder, name) for name in _NETWORKS]
    return [
        file
        for path in paths
        for file in (path, dataclasses.replace(settings, weights_save=path).last_path)
    ]


class PartnerRun(StagedRun[Settings]):
    """A run that trains the network and its partner, and keeps both in one model file.

    The networks' own files stay in `segm_logs/stages`, for a longer run to go on from.
    """

    def outcome(self) -> str:
        saved = f"saved {self.settings.weights_save}, both networks in one file"
        kept = f"{self.settings.stages_folder}, with what training longer needs"
        return f"{saved}; curves in {kept}"

    def stages(self) -> list[tuple[str, Stage]]:
        return [
            ("diffusion network", self._train_own),
            ("ImageNet network", self._train_partner),
            ("both in one file", self._join),
        ]

    def _paths(self) -> list[str]:
        return [self.path(name) for name in _NETWORKS]

    def _train_own(self, stage: str) -> str | None:
        settings = dataclasses.replace(self.settings, weights_save=self._paths()[0])
        return self.train(self.build, settings, self.data, stage)

    def _train_partner(self, stage: str) -> str | None:
        assert self.partner is not None
        lr, path = self.partner.lr, self._paths()[1]
        settings = dataclasses.replace(self.settings, lr=lr, weights_save=path)
        return self.train(self.partner.build, settings, self.data, stage)

    def _join(self, stage: str) -> str | None:
        """Write the model file."""
        loaded = [load_model(path) for path in self._paths()]
        config, weights = join([(config, model.state_dict()) for model, config, _ in loaded])
        plain = self.origin.to_plain()
        best = {"networks": [values["best"] for *_, values in loaded]}
        checkpoint.save(self.last_path, {"origin": plain})
        save_model(self.settings.weights_save, config, weights, origin=plain, best=best)
        return None
