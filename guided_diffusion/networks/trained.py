"""Reading a checkpoint: its weights, and the configuration from config.json or their shapes."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch as th

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig, MaskDiffusionConfig
from guided_diffusion.networks.config import (
    FREE_FLAGS,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SuperResConfig,
    check_flags,
)
from guided_diffusion.networks.infer import infer_model_config
from guided_diffusion.networks.record import NetworkRecord, read_record
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.runtime.text import one_line
from guided_diffusion.unet import LoadReport

AnyConfig = ModelConfig | SuperResConfig | ClassifierConfig
Network_co = TypeVar("Network_co", bound=AnyConfig, covariant=True)

# kinds of network in config.json: the configuration of each, and the script that uses it
KINDS: dict[str, tuple[type[AnyConfig], str]] = {
    "diffusion": (ModelConfig, "image_sample.py"),
    "segmentation_guided": (GuidedConfig, "image_sample.py"),
    "mask_diffusion": (MaskDiffusionConfig, "predict.py, which takes the segm.pth beside it"),
    "super_res": (SuperResConfig, "super_res_sample.py"),
    "classifier": (ClassifierConfig, "classifier_sample.py"),
}
# what DataParallel, DDP and torch.compile put before the names of parameters
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|\b_orig_mod\.")


@dataclass(frozen=True, kw_only=True)
class Trained(NetworkRecord[Network_co]):
    """A checkpoint and what is known about it.

    :param path: the file.
    :param weights: its state_dict.
    """

    path: str
    weights: Mapping[str, th.Tensor]

    def network(self, device: th.device | str) -> th.nn.Module:
        """The network for inference, its parameters frozen; half precision on CUDA only.

        :raises UserError: if the weights belong to another network.
        """
        with self._fitting():
            network = self.model.build()
            network.load_state_dict(self.weights)
        half = self.model.use_fp16 and th.device(device).type == "cuda"
        (network.convert_to_fp16 if half else network.convert_to_fp32)()
        return network.to(device).eval().requires_grad_(False)

    def load_into(self, network: th.nn.Module, weights: Mapping[str, th.Tensor]) -> None:
        """Give a network the checkpoint's weights, or what was made of them.

        :raises UserError: if they belong to another network.
        """
        with self._fitting():
            network.load_state_dict(weights)

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """:raises UserError: if the weights do not fit in the context."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.path}: {' '.join(str(error).split())}") from error
        except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
            told = isinstance(error, RuntimeError)  # torch's, which names weights and shapes
            reason = one_line(str(error).split(":", 1)[-1]) if told else "no such network"
            raise UserError(
                f"{self.path} does not fit the network that its config.json or the flags describe:"
                f" {one_line(reason)}"
            ) from error

    def without_classes(self) -> tuple[Mapping[str, th.Tensor], str]:
        """The weights of the network without its classes, and a line for the log.

        The timestep embedding takes in what the network gets for images without a class, if it
        was trained on such, or else the mean over the classes. ("" and the weights themselves for
        a network without classes.)
        """
        classes = self.weights.get("label_emb.weight")
        if classes is None:
            return self.weights, ""
        has_null = isinstance(self.model, ModelConfig) and self.model.cond_drop_prob > 0
        seen = classes[: len(self.classes) or len(classes)]  # the network may have room for more
        embedding = classes[-1] if has_null else seen.mean(0)
        weights = {k: v for k, v in self.weights.items() if k != "label_emb.weight"}
        weights["time_embed.2.bias"] = weights["time_embed.2.bias"] + embedding
        of = "no class" if has_null else f"the mean of its {len(seen)} classes"
        return weights, f"{self.path} is class-conditional: taken with the embedding of {of}"

    def check_loaded(self, report: LoadReport, new: tuple[str, ...]) -> None:
        """:raises UserError: if more starts from random weights than what `new` begins with."""
        if missing := [name for name in report.fresh if not name.startswith(new)]:
            raise UserError(
                f"{self.path} does not fit the network that its config.json or the flags describe:"
                f" {len(missing)} of {len(report.fresh) + len(report.loaded)} tensors, such as"
                f" {missing[0]}, would start from random weights. Name an unconditional checkpoint"
                " with the config.json of its own run"
            )


def read_trained(
    path: str,
    overrides: Overrides,
    kind: str = "diffusion",
    defaults: Mapping[str, Any] | None = None,
    for_tuning: bool = False,
) -> Trained:
    """Read a checkpoint and the config.json beside it.

    Without config.json, which the original package does not write, the flags describe the network;
    the architecture of a diffusion network is inferred from its weights as far as possible.

    :param path: the file, a packed model's folder or, with `hf://`, its address on the Hub.
    :param overrides: the flags that the user gave, checked against what is known.
    :param kind: the kind of network required, one of `KINDS`.
    :param defaults: values for flags that the user did not give, if there is no config.json.
    :param for_tuning: the network will be trained further, on images of any size; its noise
        schedule need not be known.
    :raises UserError: if it is not a checkpoint of such a network, if a flag contradicts the
        configuration (naming both values), or if a required flag is missing.
    """
    weights = _read_weights(path, kind)
    stored = checkpoint.read_config(path)
    if stored is None:
        overrides = {**(defaults or {}), **overrides}
        record = _from_flags(path, weights, overrides, kind, for_tuning)
    else:
        record = _from_config(path, stored, overrides, kind, for_tuning)
    changed = {k: v for k, v in overrides.items() if k in FREE_FLAGS}
    return Trained(
        model=from_flags(type(record.model), changed, record.model),
        diffusion=from_flags(DiffusionConfig, changed, record.diffusion),
        reading=record.reading,
        classes=record.classes,
        path=path,
        weights=weights,
    )


def _read_weights(path: str, kind: str) -> dict[str, th.Tensor]:
    """The state_dict in a file, under the network's own names."""
    if not path:
        flag = "--classifier_path" if kind == "classifier" else "--model_path"
        raise UserError(f"{flag} is missing: name a checkpoint such as ema_0.9999_010000.pt")
    weights = checkpoint.load(path)
    if isinstance(weights, dict) and not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path} does not hold a state_dict: expected model*.pt or ema_*.pt")
    if isinstance(weights, dict) and "state_dict" in weights and "categories" in weights:
        raise UserError(
            f"{path} is a segmentation model already, for scripts/predict.py: name the pretrained"
            " checkpoint (model*.pt or ema_*.pt)"
        )
    if not isinstance(weights, dict) or not all(map(th.is_tensor, weights.values())):
        raise UserError(f"{path} holds more than weights: expected model*.pt or ema_*.pt")
    return {_WRAPPERS.sub("", name): value for name, value in weights.items()}


def _from_config(
    path: str, stored: Mapping[str, Any], overrides: Overrides, kind: str, for_tuning: bool
) -> NetworkRecord[AnyConfig]:
    """The record in config.json, once the flags agree with it."""
    source = f"config.json beside {path}"
    found = stored.get("kind", "diffusion")
    if found != kind:
        known = KINDS.get(found) if isinstance(found, str) else None
        use = f"it is for scripts/{known[1]}" if known else "it is unknown to this version"
        raise UserError(
            f"{path} is a network of kind {one_line(found, 40)}, not {kind}: {use};"
            f" name a checkpoint of kind {kind}"
        )
    try:
        record = read_record(stored, KINDS[kind][0])
        record.diffusion.build()
    except KeyError as error:
        raise UserError(f"{source} lacks {error}: this package did not write it") from error
    except UserError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error
    free = (*FREE_FLAGS, "image_size") if for_tuning else FREE_FLAGS
    check_flags(overrides, record.model, source, free)
    # a classifier's config.json does not say what the sampled network predicts
    schedule = ("diffusion_steps", "noise_schedule", "rescale_timesteps")
    shared = schedule if kind == "classifier" else tuple(overrides)
    check_flags({k: v for k, v in overrides.items() if k in shared}, record.diffusion, source, free)
    return record


def _from_flags(
    path: str,
    weights: Mapping[str, th.Tensor],
    overrides: Overrides,
    kind: str,
    for_tuning: bool,
) -> NetworkRecord[AnyConfig]:
    """The record that the flags describe, completed from the weights."""
    diffusion = from_flags(DiffusionConfig, overrides)
    model: AnyConfig
    if kind == "diffusion":
        schedule = () if for_tuning else ("diffusion_steps", "noise_schedule")
        model = infer_model_config(weights, overrides, path, schedule)
        check_flags(overrides, model, f"the weights in {path}", FREE_FLAGS)
        diffusion = replace(diffusion, learn_sigma=model.learn_sigma)
    else:
        seen = {}
        if "in_channels" not in overrides and "input_blocks.0.0.weight" in weights:
            inputs = weights["input_blocks.0.0.weight"].shape[1]
            seen["in_channels"] = inputs // 2 if kind == "super_res" else inputs
        model = from_flags(KINDS[kind][0], {**seen, **overrides})
    return NetworkRecord(model, diffusion, ReadingConfig(model.image_size, model.in_channels))
