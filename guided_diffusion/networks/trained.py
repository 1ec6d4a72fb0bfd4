"""A trained network out of its checkpoint, as config.json beside it says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch as th

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig, MaskDiffusionConfig
from guided_diffusion.networks.config import (
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SuperResConfig,
    check_flags,
)
from guided_diffusion.networks.infer import infer_model_config
from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import from_flags, from_mapping

# kinds of network in config.json: their configuration, and the script that samples with them
KINDS = {
    "diffusion": (ModelConfig, "image_sample.py"),
    "segmentation_guided": (GuidedConfig, "image_sample.py"),
    "mask_diffusion": (MaskDiffusionConfig, "predict.py, which takes the segm.pth beside it"),
    "super_res": (SuperResConfig, "super_res_sample.py"),
    "classifier": (ClassifierConfig, "classifier_sample.py"),
}
# flags that may differ from those of the training
_FREE = ("dropout", "use_checkpoint", "use_fp16", "classifier_use_fp16", "timestep_respacing")


@dataclass(frozen=True)
class Trained:
    """A checkpoint and what is known of it.

    path: the file. model, diffusion, reading: its configurations. classes: the names of the
    classes in the order of their labels, () where unknown. weights: its state_dict.
    """

    path: str
    model: ModelConfig | SuperResConfig | ClassifierConfig
    diffusion: DiffusionConfig
    reading: ReadingConfig
    classes: tuple[str, ...]
    weights: Mapping[str, th.Tensor]

    def network(self, device: th.device | str) -> th.nn.Module:
        """The network, ready to be used but not to be trained; half precision on CUDA alone.

        :raises UserError: if the weights are of another network.
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
        (network.convert_to_fp16 if half else network.convert_to_fp32)()
        return network.to(device).eval().requires_grad_(False)


def read_trained(
    path: str,
    overrides: Mapping[str, Any],
    kind: str = "diffusion",
    defaults: Mapping[str, Any] | None = None,
) -> Trained:
    """Read a checkpoint and the config.json beside it.

    Without config.json, which the original package does not write, the flags describe the network;
    that of a diffusion network is read from its weights as far as they tell it.

    :param overrides: the given flags, checked against what is known.
    :param kind: which network is wanted, one of `KINDS`.
    :param defaults: values of flags that are not given, where there is no config.json.
    :raises UserError: if the file is none, the network of another kind, a flag contradicts the
        configuration (naming both values) or must be given and is not.
    """
    flag = "--classifier_path" if kind == "classifier" else "--model_path"
    if not path:
        raise UserError(f"{flag} is missing: name a checkpoint such as ema_0.9999_010000.pt")
    weights = checkpoint.load(path)
    if not isinstance(weights, dict) or not all(map(th.is_tensor, weights.values())):
        raise UserError(f"{path} holds no weights alone: {flag} expects model*.pt or ema_*.pt")
    stored = checkpoint.read_config(path)
    if stored is None:
        overrides = {**(defaults or {}), **overrides}
        model = _without_config(path, weights, overrides, kind)
        diffusion = from_flags(DiffusionConfig, overrides)
        if kind == "diffusion" and "learn_sigma" not in overrides:
            diffusion = from_flags(DiffusionConfig, {"learn_sigma": model.learn_sigma}, diffusion)
        reading = ReadingConfig(model.image_size, model.in_channels)
        return Trained(path, model, diffusion, reading, (), weights)
    source = f"config.json beside {path}"
    try:
        found = stored.get("kind", "diffusion")
        if found != kind and found in KINDS:
            raise UserError(
                f"{path} is a network of the kind {found}, not {kind}: it is for"
                f" scripts/{KINDS[found][1]}"
            )
        model = from_mapping(KINDS[kind][0], stored["model"])
        diffusion = from_mapping(DiffusionConfig, stored["diffusion"])
        reading = ReadingConfig.from_dict(stored["reading"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} lacks {error}: it is not of this package") from error
    check_flags(overrides, model, source, _FREE)
    # the classifier's own process does not tell what its network predicts
    schedule = ("diffusion_steps", "noise_schedule", "rescale_timesteps")
    shared = schedule if kind == "classifier" else tuple(overrides)
    check_flags({k: v for k, v in overrides.items() if k in shared}, diffusion, source, _FREE)
    return Trained(
        path,
        from_flags(type(model), {k: v for k, v in overrides.items() if k in _FREE}, model),
        from_flags(DiffusionConfig, {k: v for k, v in overrides.items() if k in _FREE}, diffusion),
        reading,
        tuple(stored.get("classes", ())),
        weights,
    )


def _without_config(
    path: str, weights: Mapping[str, th.Tensor], overrides: Mapping[str, Any], kind: str
) -> ModelConfig | SuperResConfig | ClassifierConfig:
    if kind == "diffusion":
        needed = ("image_size", "diffusion_steps", "noise_schedule")
        model = infer_model_config(weights, overrides, path, needed)
        check_flags(overrides, model, f"the weights in {path}", _FREE)
        return from_flags(ModelConfig, {k: v for k, v in overrides.items() if k in _FREE}, model)
    seen = {}
    if "in_channels" not in overrides and "input_blocks.0.0.weight" in weights:
        inputs = weights["input_blocks.0.0.weight"].shape[1]
        seen["in_channels"] = inputs // 2 if kind == "super_res" else inputs
    return from_flags(KINDS[kind][0], {**seen, **overrides})
