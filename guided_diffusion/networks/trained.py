"""Reading a checkpoint: its weights, and the configuration that config.json or shapes give."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch as th

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig, MaskDiffusionConfig
from guided_diffusion.networks.config import (
    FREE_FLAGS,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    NetworkConfig,
    SuperResConfig,
    check_flags,
)
from guided_diffusion.networks.infer import infer_model_config
from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import from_flags, from_mapping

Network = TypeVar("Network", bound=NetworkConfig)

# kinds of network in config.json: their configuration, and the script that uses them
KINDS: dict[str, tuple[type[NetworkConfig], str]] = {
    "diffusion": (ModelConfig, "image_sample.py"),
    "segmentation_guided": (GuidedConfig, "image_sample.py"),
    "mask_diffusion": (MaskDiffusionConfig, "predict.py, which takes the segm.pth beside it"),
    "super_res": (SuperResConfig, "super_res_sample.py"),
    "classifier": (ClassifierConfig, "classifier_sample.py"),
}


@dataclass(frozen=True)
class Trained(Generic[Network]):
    """A checkpoint and what is known about it.

    path: the file. model, diffusion, reading: its configurations. classes: names of the classes
    in the order of their labels, () where unknown. weights: its state_dict.
    """

    path: str
    model: Network
    diffusion: DiffusionConfig
    reading: ReadingConfig
    classes: tuple[str, ...]
    weights: Mapping[str, th.Tensor]

    def network(self, device: th.device | str) -> th.nn.Module:
        """The network for inference, its parameters frozen; half precision on CUDA alone.

        :raises UserError: if the weights belong to another network.
        """
        network = self.model.build()
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split(":", 1)[-1].split())[:200]
            raise UserError(
                f"{self.path} does not fit the network that the flags describe: {reason}"
            ) from error
        half = self.model.use_fp16 and th.device(device).type == "cuda"
        getattr(network, "convert_to_fp16" if half else "convert_to_fp32")()
        return network.to(device).eval().requires_grad_(False)


def read_trained(
    path: str,
    overrides: Mapping[str, Any],
    kind: str = "diffusion",
    defaults: Mapping[str, Any] | None = None,
    for_tuning: bool = False,
) -> Trained:
    """Read a checkpoint and the config.json beside it.

    Without config.json, which the original package does not write, the flags describe the network;
    the architecture of a diffusion network is inferred from its weights as far as possible.

    :param overrides: the flags that the user gave, checked against what is known.
    :param kind: the kind of network required, one of `KINDS`.
    :param defaults: values of flags that were not given, where there is no config.json.
    :param for_tuning: the network is to be trained further: on images of any size, and without
        its noise schedule.
    :raises UserError: if it is not a checkpoint of such a network, if a flag contradicts the
        configuration (naming both values), or if a flag is required and was not given.
    """
    weights = _read_weights(path, kind)
    stored = checkpoint.read_config(path)
    if stored is None:
        return _without_config(path, weights, {**(defaults or {}), **overrides}, kind, for_tuning)
    source = f"config.json beside {path}"
    try:
        found = stored.get("kind", "diffusion")
        if found != kind and found in KINDS:
            raise UserError(
                f"{path} is a network of kind {found}, not {kind}: it is for"
                f" scripts/{KINDS[found][1]}"
            )
        model = from_mapping(KINDS[kind][0], stored["model"])
        diffusion = from_mapping(DiffusionConfig, stored["diffusion"])
        reading = ReadingConfig.from_dict(stored["reading"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} lacks {error}: this package did not write it") from error
    free = (*FREE_FLAGS, "image_size") if for_tuning else FREE_FLAGS
    check_flags(overrides, model, source, free)
    # a classifier's own config does not say what the sampled network predicts
    schedule = ("diffusion_steps", "noise_schedule", "rescale_timesteps")
    shared = schedule if kind == "classifier" else tuple(overrides)
    check_flags({k: v for k, v in overrides.items() if k in shared}, diffusion, source, free)
    changed = {k: v for k, v in overrides.items() if k in FREE_FLAGS}
    return Trained(
        path,
        from_flags(type(model), changed, model),
        from_flags(DiffusionConfig, changed, diffusion),
        reading,
        tuple(stored.get("classes", ())),
        weights,
    )


def _read_weights(path: str, kind: str) -> dict[str, th.Tensor]:
    """The state_dict in a file, under the network's own names."""
    if not path:
        flag = "--classifier_path" if kind == "classifier" else "--model_path"
        raise UserError(f"{flag} is missing: name a checkpoint such as ema_0.9999_010000.pt")
    weights = checkpoint.load(path)
    if isinstance(weights, dict) and "state_dict" in weights and "categories" in weights:
        raise UserError(
            f"{path} is a segmentation model already, for scripts/predict.py: name the pretrained"
            " checkpoint (model*.pt or ema_*.pt)"
        )
    if not isinstance(weights, dict) or not all(map(th.is_tensor, weights.values())):
        raise UserError(f"{path} holds more than weights: expected model*.pt or ema_*.pt")
    return {_unwrapped(name): value for name, value in weights.items()}


def _unwrapped(name: str) -> str:
    """A parameter's name without what DataParallel, DDP and torch.compile put before it."""
    return re.sub(r"^(module\.)+", "", re.sub(r"\b_orig_mod\.", "", name))


def _without_config(
    path: str,
    weights: Mapping[str, th.Tensor],
    overrides: Mapping[str, Any],
    kind: str,
    for_tuning: bool,
) -> Trained:
    diffusion = from_flags(DiffusionConfig, overrides)
    model: NetworkConfig
    if kind == "diffusion":
        schedule = () if for_tuning else ("diffusion_steps", "noise_schedule")
        inferred = infer_model_config(weights, overrides, path, schedule)
        check_flags(overrides, inferred, f"the weights in {path}", FREE_FLAGS)
        changed = {k: v for k, v in overrides.items() if k in FREE_FLAGS}
        model = from_flags(ModelConfig, changed, inferred)
        if "learn_sigma" not in overrides:
            learned = {"learn_sigma": inferred.learn_sigma}
            diffusion = from_flags(DiffusionConfig, learned, diffusion)
    else:
        seen = {}
        if "in_channels" not in overrides and "input_blocks.0.0.weight" in weights:
            inputs = weights["input_blocks.0.0.weight"].shape[1]
            seen["in_channels"] = inputs // 2 if kind == "super_res" else inputs
        model = from_flags(KINDS[kind][0], {**seen, **overrides})
    reading = ReadingConfig(model.image_size, model.in_channels)
    return Trained(path, model, diffusion, reading, (), weights)
