"""A training that begins from the weights of a trained network: --init_checkpoint.

A plain pretraining adapts the network to other images: of another size, with 1 channel instead of
3 or 3 instead of 1, with or without learned variances and classes. Of images whose channels are
equal, a network with 1 channel predicts the mean of what the one with 3 predicts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch as th

from guided_diffusion import logger
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import (
    FREE_FLAGS,
    ModelConfig,
    NetworkConfig,
    check_flags,
)
from guided_diffusion.networks.levels import attention_factors
from guided_diffusion.networks.record import NetworkRecord
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime.command_line.flags import Overrides, from_mapping
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.runtime.storage.contents import changes
from guided_diffusion.unet import ConditionalUNetModel

Network = TypeVar("Network", bound=NetworkConfig)

# what flags may say otherwise than the network: with a condition, and without one
_CONDITIONED = ("learn_sigma", "class_cond", "num_classes", "cond_drop_prob")
_ADAPTED = ("image_size", "in_channels", *_CONDITIONED)
_FIRST, _LAST, _CLASSES = "input_blocks.0.0.weight", "out.2.", "label_emb.weight"


def read_init(path: str, overrides: Overrides, kind: str) -> Trained[ModelConfig]:
    """The unconditional network to start from.

    Without config.json beside it, the flags describe it.

    :param kind: of the network to train; "diffusion" is adapted, others take the network as it is.
    :raises UserError: if the flags say otherwise than the network, but for what can be adapted.
    """
    adapts = kind == "diffusion"
    recorded = checkpoint.read_config(path) is not None
    if recorded:
        names = {f.name for f in dataclasses.fields(ModelConfig)}.difference(_CONDITIONED)
        described = {name: v for name, v in overrides.items() if name in names and not adapts}
    else:
        left_out = {*_ADAPTED} - {"image_size"} if adapts else ()
        described = {name: v for name, v in overrides.items() if name not in left_out}
    init: Trained[ModelConfig] = read_trained(path, described)
    if not adapts:
        return init
    model = _of_size(init.model, overrides.get("image_size", init.model.image_size))
    source = f"config.json beside {path}" if recorded else f"the weights in {path}"
    check_flags(overrides, model, source, (*_ADAPTED, *FREE_FLAGS))
    return dataclasses.replace(init, model=model)


def _of_size(model: ModelConfig, size: int) -> ModelConfig:
    """The same network for images of another size: attention stays in its levels."""
    model = model.with_explicit_channel_mult()
    if size == model.image_size:
        return model
    levels = len(model.mult())
    factors = attention_factors(model.attention_resolutions, model.image_size, levels)
    resolutions = ",".join(str(max(1, size // factor)) for factor in factors)
    return dataclasses.replace(model, image_size=size, attention_resolutions=resolutions)


def record_of_init(
    init: Trained, model_type: type[Network], reading: ReadingConfig | None = None
) -> NetworkRecord[Network]:
    """What the flags leave open: as the unconditional network, whose classes give way.

    :param reading: of the images; only its `resize` counts, in place of a crop.
    """
    fields = {**dataclasses.asdict(init.model), "class_cond": False, "cond_drop_prob": 0.0}
    resize = init.reading.resize
    if reading is not None and resize == "crop":
        resize = reading.resize
    return NetworkRecord(
        from_mapping(model_type, fields),
        init.diffusion,
        dataclasses.replace(init.reading, resize=resize),
    )


def widen(network: ConditionalUNetModel, init: Trained, at: int = 0) -> None:
    """Load an unconditional network's weights into a conditional one; log what was loaded.

    :param at: see ConditionalUNetModel.load_widened.
    :raises UserError: if more than the output layer does not fit.
    """
    try:
        weights, message = init.without_classes()
        report = network.load_widened(weights, at)
    except ValueError as error:
        raise UserError(f"--init_checkpoint {init.path}: {error}") from error
    init.check_loaded(report, (_LAST,))
    if message:
        logger.log(message)
    logger.log(f"{init.path}: {report}; the other channels of the input layer start at zero")


def adapt(network: th.nn.Module, init: Trained, record: NetworkRecord[ModelConfig]) -> None:
    """Load a trained network's weights into one for other images; log what is new.

    :param record: of the network.
    :raises UserError: if the weights are of another network.
    """
    own = network.state_dict()
    keeps = bool(record.classes) and record.classes == init.classes
    keeps = keeps and own[_CLASSES].shape == init.weights[_CLASSES].shape
    loaded, message = (init.weights, "") if keeps else init.without_classes()
    weights = of_channels(loaded, record.model.in_channels, record.model.learn_sigma)
    new = []
    if _CLASSES in own and not keeps:
        weights[_CLASSES] = th.zeros_like(own[_CLASSES])
        new.append("the classes, which make no difference at first")
    if record.model.learn_sigma and not init.model.learn_sigma:
        new.append("the variances, which start midway between their bounds")
    init.load_into(network, weights)
    if message:
        logger.log(message)
    said = f"{init.path}: {len(loaded)} tensors loaded; new: {', '.join(new) or 'nothing'}"
    differs = _differences(init, record)
    logger.log(f"{said}; adapted: {', '.join(differs)}" if differs else said)


def _differences(init: Trained, record: NetworkRecord[ModelConfig]) -> list[str]:
    """In which settings the new network, its process and its images differ, in words."""
    pairs: list[tuple[object, object]] = [(init.model, record.model)]
    if checkpoint.read_config(init.path) is not None:  # else they are unknown
        pairs += [(init.diffusion, record.diffusion), (init.reading, record.reading)]
    found = [
        text
        for before, now in pairs
        for name in vars(now)
        if name not in FREE_FLAGS
        for text in changes(name, getattr(before, name), getattr(now, name))
    ]
    return list(dict.fromkeys(found))


def of_channels(
    weights: Mapping[str, th.Tensor], channels: int, learn_sigma: bool
) -> dict[str, th.Tensor]:
    """A diffusion network's weights for images of another number of channels.

    The input layer sums over what were three channels, or a third of it sees each of three; the
    output layer gives their mean, or three times the same. So both networks predict the same, in
    the mean over channels, of an image whose channels are equal. New variances start at zero, as
    those of a new network do.

    :param weights: with 1 or 3 channels, with or without variances.
    :param channels: 1 or 3.
    """
    found = dict(weights)
    first = weights[_FIRST].float()
    before = first.shape[1]
    if before != channels:
        total = first.sum(1, keepdim=True)
        found[_FIRST] = total if channels == 1 else total.expand(-1, channels, -1, -1) / channels
    for name in (f"{_LAST}weight", f"{_LAST}bias"):
        parts: Sequence[th.Tensor] = weights[name].float().split(before)
        if before != channels:
            parts = [part.mean(0, keepdim=True) for part in parts]
            parts = [part.expand(channels, *part.shape[1:]) for part in parts]
        mean, variance = parts[0], parts[-1] if len(parts) == 2 else th.zeros_like(parts[0])
        found[name] = th.cat([mean, variance]) if learn_sigma else mean.clone()
    return found
