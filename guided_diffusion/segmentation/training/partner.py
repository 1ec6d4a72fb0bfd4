"""Fine-tuning two kinds of network on the same masks, which then predict as one.

The networks differ in what they have learnt before: the diffusion network from radiographs, the
other from photographs. So they err in different places, and a mean of their probabilities, in
which the more certain one counts more, is better than either (measured in
docs/label-efficiency.md).
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Generic

import torch as th

from guided_diffusion import dist_util
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks import imagenet
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model, save_model
from guided_diffusion.segmentation.networks.union import join
from guided_diffusion.segmentation.training.dataset import LabelledImages, TrainingData
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.loop import InitialNetwork
from guided_diffusion.segmentation.training.resume import Origin
from guided_diffusion.segmentation.training.self_training import SelfTraining
from guided_diffusion.segmentation.training.smp_network import smp_network
from guided_diffusion.segmentation.training.stages import Build, Settings, Stage, StagedRun
from guided_diffusion.segmentation.training.validation import mean_iou

_NAMES = ("diffusion", "ImageNet")

# files of the two in the folder of the stages
_NETWORKS = ("diffusion.pth", "imagenet.pth")


@dataclasses.dataclass(frozen=True)
class Partner(Generic[Settings]):
    """Another kind of network that learns from the same masks, and its learning rate."""

    build: Build[Settings]
    lr: float


def imagenet_partner(reading: ReadingConfig, categories: ClassTable, lr: float) -> Partner:
    """smp's U-Net with an encoder pretrained on ImageNet.

    :raises UserError: if its packages are not installed.
    """
    from guided_diffusion.segmentation.networks.smp_unet import LITE0

    if not imagenet.installed():
        alone = "--partner none trains the diffusion network alone"
        raise UserError(f"--partner imagenet needs its weights: {imagenet.REMEDY}; {alone}")
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

    With validation images, it keeps the better one alone if that is ahead of both together. The
    networks' own files stay in `segm_logs/stages`, for a longer run to go on from. With radiographs
    that have no masks, the network is the student of `SelfTraining`; the partner learns from the
    masks alone, and does not label.

    :param build: makes the network.
    :param partner: the other one.
    :param settings, data, sources, use_fp16, origin: see `StagedRun`.
    """

    _scores = ""
    _kept = "both networks in one file"

    def __init__(
        self,
        build: Build[Settings],
        partner: Partner[Settings],
        settings: Settings,
        data: TrainingData,
        sources: Mapping[str, str],
        use_fp16: bool,
        origin: Origin,
    ):
        super().__init__(build, settings, data, sources, use_fp16, origin)
        self.partner = partner

    def outcome(self) -> str:
        saved = f"saved {self.settings.weights_save}, {self._kept}"
        stages = f"curves, and what training longer needs, in {self.settings.stages_folder}"
        return f"{self._scores}{saved}; {stages}"

    def stages(self) -> list[tuple[str, Stage]]:
        own, partner = (f"{name} network" for name in _NAMES)
        return [
            (own, self._train_own),
            (partner, self._train_partner),
            ("both in one file", self._join),
        ]

    def _paths(self) -> list[str]:
        return [self.path(name) for name in _NETWORKS]

    def _train_own(self, stage: str) -> str | None:
        settings = dataclasses.replace(self.settings, weights_save=self._paths()[0])
        if not settings.self_training:
            return self.train(self.build, settings, self.data, stage)
        own = SelfTraining(
            self.build, settings, self.data, self.sources, self.use_fp16, self.origin
        )
        own.run()
        return own.stopped_by

    def _train_partner(self, stage: str) -> str | None:
        lr, path = self.partner.lr, self._paths()[1]
        settings = dataclasses.replace(self.settings, lr=lr, weights_save=path)
        return self.train_on_masks(self.partner.build, settings, stage)

    def _join(self, stage: str) -> str | None:
        """Write the model file."""
        loaded = [load_model(path) for path in self._paths()]
        config, weights = join([(config, model.state_dict()) for model, config, _ in loaded])
        best = {"networks": [values["best"] for *_, values in loaded]}
        if self.data.val is not None:
            alone = [values["best"]["mean_iou"] for *_, values in loaded]
            both = self._validate(config, weights, self.data.val)
            names = [f"{name} network {iou:.4f}" for name, iou in zip(_NAMES, alone)]
            scores = f"{', '.join(names)}, both together {both:.4f}"
            self._scores = f"mean IoU on the validation images: {scores}\n"
            if max(alone) > both:
                number = alone.index(max(alone))
                model, config, values = loaded[number]
                weights, best = model.state_dict(), values["best"]
                self._kept = f"the {_NAMES[number]} network alone"
        plain = self.origin.to_plain()
        checkpoint.save(self.last_path, {"origin": plain})
        save_model(self.settings.weights_save, config, weights, origin=plain, best=best)
        return None

    def _validate(
        self, config: SegmentationConfig, weights: dict[str, th.Tensor], data: LabelledImages
    ) -> float:
        """Mean IoU of the union on the validation images."""
        model = config.build()
        model.load_state_dict(weights)
        return mean_iou(model.to(dist_util.dev()), data, self.settings.forward_size)
