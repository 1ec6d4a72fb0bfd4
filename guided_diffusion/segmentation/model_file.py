"""`segm.pth`: a segmentation network with everything needed to use it.

One file holds the weights, the architecture, the class table and how radiographs were read, as
tensors and plain values; it is written atomically.
"""

import contextlib
import dataclasses
import importlib
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch as th

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.images.swaps import Swaps, parse_swaps
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.runtime.text import one_line
from guided_diffusion.segmentation.categories import (
    ClassTable,
    from_plain,
    to_plain,
)

FORMAT = "guided-diffusion segmentation 1"

# the module of each kind of network; `networks.kind` says what such a module must define. Each
# network maps [N x in_channels x H x W] in [-1, 1], of any size, to logits [N x classes x H x W]
KINDS = {
    "unet": "guided_diffusion.segmentation.networks.unet",
    "smp": "guided_diffusion.segmentation.networks.smp_unet",
    "features": "guided_diffusion.segmentation.networks.feature_classifier",
    "mask_diffusion": "guided_diffusion.segmentation.networks.mask_diffusion",
    "union": "guided_diffusion.segmentation.networks.union",
}


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    """Everything about a segmentation network except its weights.

    :param model: the diffusion network that it is made from, None for a kind that has none.
    :param reading: how radiographs are read.
    :param categories: one per class.
    :param depth: number of that network's levels kept, None for all.
    :param timestep: at which radiographs enter, in the network's units.
    :param kind: a key of KINDS.
    :param options: further plain values that the kind needs.
    :param flip_swaps: the classes exchanged when training mirrored left and right, () for none;
        None where training mirrored nothing, or where the file does not say.
    :param diffusion: the process that the model was pretrained for; None if there is none, or if
        the file does not say: then no timesteps are converted.
    """

    model: ModelConfig | None
    reading: ReadingConfig
    categories: ClassTable
    depth: int | None = None
    timestep: float = 1
    kind: str = "unet"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    flip_swaps: Swaps | None = None
    diffusion: DiffusionConfig | None = None

    @property
    def in_channels(self) -> int:
        return self.reading.in_channels

    def network_timesteps(self, steps: Sequence[float]) -> tuple[float, ...]:
        """Diffusion steps in the units of the network.

        :raises UserError: for a step that the diffusion does not have.
        """
        if self.diffusion is None:
            return tuple(steps)
        last = self.diffusion.diffusion_steps - 1
        if any(step > last for step in steps):
            raise UserError(
                f"--timesteps {','.join(f'{step:g}' for step in steps)}: the diffusion of this"
                f" network has steps 0 to {last}"
            )
        return tuple(network_timestep(step, self.diffusion) for step in steps)

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
            "flip_swaps": None if self.flip_swaps is None else [list(p) for p in self.flip_swaps],
            "diffusion": self.diffusion and dataclasses.asdict(self.diffusion),
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any], source: str) -> "SegmentationConfig":
        """Read what `to_plain` wrote, and the files of version 0.1.0.

        :raises UserError: if `values` do not describe a segmentation network of a known kind.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(
                f"{source} is not a segmentation model: expected a file from scripts/finetune.py"
            )
        kind = values.get("kind", "unet")
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(
                f"{source} holds a network of kind {kind!r:.60}, unknown to this version (known:"
                f" {', '.join(KINDS)}): update the package"
            )
        with _faults_of(source):
            model, diffusion = values["model"], values.get("diffusion")
            plain = {
                "model": None if model is None else from_mapping(ModelConfig, model),
                "reading": ReadingConfig.from_dict(values["reading"]),
                "categories": from_plain(values["categories"], source),
                "depth": values["depth"],
                "timestep": values["timestep"],
                "kind": kind,
                "options": values.get("options", {}),
                "flip_swaps": _read_swaps(values),
                "diffusion": diffusion and from_mapping(DiffusionConfig, diffusion),
            }
            return from_mapping(cls, plain)


def swaps_of_training(flip: str, flip_swap: str) -> Swaps | None:
    """`flip_swaps` of a network trained with these flags."""
    mirrored = bool(flip_swap) or flip in ("horizontal", "both")
    return parse_swaps(flip_swap) if mirrored else None


def _read_swaps(values: dict[str, Any]) -> Swaps | None:
    if "flip_swaps" in values:
        pairs = values["flip_swaps"]
        return None if pairs is None else tuple((one, other) for one, other in pairs)
    flags = values.get("origin") or {}  # version 0.1.0 recorded the flags alone
    return swaps_of_training(flags.get("flip", "none"), str(flags.get("flip_swap", "")))


def save_model(
    path: str, config: SegmentationConfig, weights: dict[str, th.Tensor], **extra: Any
) -> None:
    """Write a model file.

    :param extra: further plain values, such as scores.
    """
    checkpoint.save(path, {**config.to_plain(), **extra, "state_dict": weights})


def load_model(path: str) -> tuple[th.nn.Module, SegmentationConfig, dict[str, Any]]:
    """Read a model file.

    :return: the network in eval mode on the CPU, its configuration, and all values of the file.
    :raises UserError: if it is not a model file.
    """
    values = checkpoint.load(path)
    config = SegmentationConfig.from_plain(values, path)
    with _faults_of(path):
        model = config.build()
        model.load_state_dict(values["state_dict"])
    return model.eval(), config, values


@contextlib.contextmanager
def _faults_of(source: str) -> Iterator[None]:
    """What a file that this package did not write raises becomes a UserError that names it."""
    try:
        with warnings.catch_warnings():  # of layers without channels, which weights do not fit
            warnings.simplefilter("ignore")
            yield
    except UserError as error:
        text = str(error)
        raise UserError(text if source in text else f"{source}: {text}") from error
    except KeyError as error:
        raise UserError(f"{source} lacks {error}: this package did not write it") from error
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"{source} describes no network that can be built: this package did not write it"
        ) from error
    except RuntimeError as error:
        reason = one_line(str(error).split(":", 1)[-1])
        raise UserError(
            f"{source} holds weights of another network than it describes: {reason}"
        ) from error
