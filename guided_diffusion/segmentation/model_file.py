"""`segm.pth`: a segmentation network with all that is needed to use it.

One file holds the weights, the architecture, the class table and how radiographs were read; plain
tensors and plain values, written atomically.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

import torch as th

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import from_mapping
from guided_diffusion.segmentation.categories import Category, from_plain, to_plain

FORMAT = "guided-diffusion segmentation 1"

# the module of each kind of network; `networks.kind` says what such a module must define. Each
# network maps [N x in_channels x H x W] in [-1, 1], of any size, to logits [N x classes x H x W]
KINDS = {
    "unet": "guided_diffusion.segmentation.networks.unet",
    "smp": "guided_diffusion.segmentation.networks.smp_unet",
    "features": "guided_diffusion.segmentation.networks.feature_classifier",
    "mask_diffusion": "guided_diffusion.segmentation.networks.mask_diffusion",
}


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    """What a segmentation network is, besides its weights.

    model: the diffusion network it grew out of, None for a kind that has none. depth: levels kept
    of it, None for all. timestep: at which radiographs enter, in the network's units. categories:
    one a class. kind: of KINDS. options: plain values that the kind needs besides.
    """

    model: ModelConfig | None
    reading: ReadingConfig
    categories: tuple[Category, ...]
    depth: int | None = None
    timestep: float = 1
    kind: str = "unet"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def in_channels(self) -> int:
        return self.reading.in_channels

    def build(self) -> th.nn.Module:
        """The network with random weights."""
        return self.kind_module().build(self)

    def kind_module(self) -> ModuleType:
        """The module of KINDS that this kind of network is defined in."""
        return importlib.import_module(KINDS[self.kind])

    def to_plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": None if self.model is None else dataclasses.asdict(self.model),
            "reading": self.reading.to_dict(),
            "categories": to_plain(self.categories),
            "depth": self.depth,
            "timestep": self.timestep,
            "kind": self.kind,
            "options": self.options,
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any], source: str) -> "SegmentationConfig":
        """:raises UserError: if `values` are of no segmentation network, or of an unknown kind."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(
                f"{source} is no segmentation model: expected a file that scripts/finetune.py wrote"
            )
        kind = values.get("kind", "unet")
        if kind not in KINDS:
            raise UserError(
                f"{source} holds a network of kind {kind!r}, which this version does not know"
                f" (it knows {', '.join(KINDS)}): update the package"
            )
        model = values["model"]
        return cls(
            model=None if model is None else from_mapping(ModelConfig, model),
            reading=ReadingConfig.from_dict(values["reading"]),
            categories=from_plain(values["categories"], source),
            depth=values["depth"],
            timestep=values["timestep"],
            kind=kind,
            options=values.get("options", {}),
        )


def save_model(
    path: str, config: SegmentationConfig, weights: dict[str, th.Tensor], **extra: Any
) -> None:
    """Write a model file; `extra` holds further plain values, such as scores."""
    checkpoint.save(path, {**config.to_plain(), **extra, "state_dict": weights})


def load_model(path: str) -> tuple[th.nn.Module, SegmentationConfig, dict[str, Any]]:
    """The network in eval mode on the CPU, its configuration, and all that the file holds."""
    values = checkpoint.load(path)
    config = SegmentationConfig.from_plain(values, path)
    model = config.build()
    model.load_state_dict(values["state_dict"])
    return model.eval(), config, values
