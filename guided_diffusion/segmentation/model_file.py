"""`segm.pth`: a segmentation network with all that is needed to use it.

One file holds the weights, the architecture, the class table and how radiographs were read; plain
tensors and plain values, written atomically.
"""

import dataclasses
from typing import Any

import torch as th

from guided_diffusion import checkpoint
from guided_diffusion.errors import UserError
from guided_diffusion.flags import pick
from guided_diffusion.reading import ReadingConfig
from guided_diffusion.script_util import ModelConfig
from guided_diffusion.segmentation.categories import Category, from_plain, to_plain
from guided_diffusion.unet import SegmentationUNetModel

FORMAT = "guided-diffusion segmentation 1"


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    """What a segmentation network is, besides its weights.

    model: the diffusion network it grew out of. depth: levels kept of it, None for all. timestep:
    at which radiographs enter, in the network's units. categories: one a class.
    """

    model: ModelConfig
    reading: ReadingConfig
    categories: tuple[Category, ...]
    depth: int | None = None
    timestep: float = 1

    def build(self) -> SegmentationUNetModel:
        """The network with random weights."""
        return self.model.build_segmentation(len(self.categories), self.depth, self.timestep)

    def to_plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": dataclasses.asdict(self.model),
            "reading": self.reading.to_dict(),
            "categories": to_plain(self.categories),
            "depth": self.depth,
            "timestep": self.timestep,
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any], source: str) -> "SegmentationConfig":
        """:raises UserError: if `values` are of no segmentation network."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(
                f"{source} is no segmentation model: expected a file that scripts/finetune.py wrote"
            )
        return cls(
            model=pick(ModelConfig, values["model"]),
            reading=ReadingConfig.from_dict(values["reading"]),
            categories=from_plain(values["categories"], source),
            depth=values["depth"],
            timestep=values["timestep"],
        )


def save_model(
    path: str, config: SegmentationConfig, weights: dict[str, th.Tensor], **extra: Any
) -> None:
    """Write a model file; `extra` holds further plain values, such as scores."""
    checkpoint.save(path, {**config.to_plain(), **extra, "state_dict": weights})


def load_model(path: str) -> tuple[SegmentationUNetModel, SegmentationConfig, dict[str, Any]]:
    """The network in eval mode on the CPU, its configuration, and all that the file holds."""
    values = checkpoint.load(path)
    config = SegmentationConfig.from_plain(values, path)
    model = config.build()
    model.load_state_dict(values["state_dict"])
    return model.eval(), config, values
