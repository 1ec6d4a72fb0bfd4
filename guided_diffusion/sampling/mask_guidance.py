"""Sampling images guided by segmentation masks (arXiv 2402.05210)."""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.images.files import list_images, name_images, split_folder
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import write_image
from guided_diffusion.images.masks import ignored_values, read_mask
from guided_diffusion.networks.conditional import GuidedConfig, one_hot
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime.command_line.flags import Overrides
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.runtime.text import encode
from guided_diffusion.sampling.choices import Labels
from guided_diffusion.sampling.config import (
    MOST_SAMPLES,
    GuidedSampleConfig,
    said_of_defaults,
    sample_settings,
)
from guided_diffusion.sampling.guidance import ClassifierFree
from guided_diffusion.sampling.job import SampleJob, as_flags_say, class_labels, guided


@dataclasses.dataclass(frozen=True)
class GuidingMasks:
    """Masks to sample images for; image k belongs to mask k // per_mask.

    names: names of the masks. paths: their files. per_mask: images per mask. dropped: classes left
    unspecified. ignore: values of pixels without a label. trained: the network.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    per_mask: int
    dropped: tuple[int, ...]
    ignore: tuple[int, ...]
    trained: Trained

    def image_names(self) -> list[str]:
        """Names of the images: those of the masks, numbered if a mask has several images."""
        if self.per_mask == 1:
            return list(self.names)
        return [f"{name}_{number}" for name in self.names for number in range(self.per_mask)]

    def mask(self, index: int) -> np.ndarray:
        """The mask of image `index`: class indices, uint8 `[H x W]` at the network's size.

        Unspecified classes and padding become background.
        """
        classes = self.trained.model.num_segmentation_classes
        mask = read_mask(self.paths[index // self.per_mask], classes, self.ignore)
        mask = self.trained.reading.geometry().apply_mask(mask)
        return np.where(np.isin(mask, (*self.dropped, IGNORE)), 0, mask).astype(np.uint8)

    def conditions(self, indices: Sequence[int]) -> dict[str, th.Tensor]:
        """The network's `cond` for images with these indices, one-hot `[N x K x H x W]`."""
        masks = th.from_numpy(np.stack([self.mask(index) for index in indices]))
        classes = self.trained.model.num_segmentation_classes
        return {"cond": one_hot(masks, classes).to(dist_util.dev())}

    def write(self, count: int, folder: str) -> None:
        """Write `MASK/NAME.png` for the first `count` images; IMG and MASK then form a dataset."""
        for index, name in enumerate(self.image_names()[:count]):
            path = bf.join(folder, "MASK", f"{name}.png")
            if not bf.exists(path):
                write_image(path, self.mask(index))

    def identity(self) -> dict[str, Any]:
        """The settings that distinguish these masks from others, as plain values."""
        crc = 0
        for name, path in zip(self.names, self.paths):
            with bf.BlobFile(path, "rb") as file:
                crc = zlib.crc32(file.read(), zlib.crc32(encode(name), crc))
        return {
            "masks": crc,
            "samples_per_mask": self.per_mask,
            "ablate_classes": list(self.dropped),
            **({"ignore": list(self.ignore)} if self.ignore else {}),
        }


def image_job(overrides: Overrides) -> SampleJob:
    """The job of `image_sample.py`, with or without masks.

    :param overrides: the flags given on the command line.
    :raises UserError: if the network cannot do what they ask.
    """
    every = MOST_SAMPLES if overrides.get("seg_dir") else 0
    settings = sample_settings(GuidedSampleConfig, overrides, every)
    trained = as_flags_say(_read_trained(settings.model_path, overrides), settings)
    masks = guiding_masks(settings, trained)
    labels = class_labels(settings, trained)
    if masks is not None:
        return _guided_job(settings, trained, labels, masks, overrides)
    model = guided(trained.network(dist_util.dev()), settings, trained)
    return SampleJob(settings, trained, model, labels, defaults=said_of_defaults(overrides))


def _read_trained(path: str, overrides: Overrides) -> Trained:
    """`read_trained`, for a mask-guided or an ordinary network as its config.json says.

    :raises UserError: if the flags ask for mask guidance that it was not trained for.
    """
    stored = checkpoint.read_config(path) if path else None
    guided = stored is not None and stored.get("kind") == "segmentation_guided"
    if overrides.get("segmentation_guided") and not guided:
        raise UserError(f"{path} was trained without --segmentation_guided True")
    return read_trained(path, overrides, "segmentation_guided" if guided else "diffusion")


def guiding_masks(settings: GuidedSampleConfig, trained: Trained) -> GuidingMasks | None:
    """The masks that the flags select; None to sample without masks.

    :raises UserError: if the network was not trained for it, or a mask is invalid.
    """
    if not isinstance(trained.model, GuidedConfig):
        for name in ("seg_dir", "ablate_classes"):
            if getattr(settings, name):
                raise UserError(
                    f"--{name}: {trained.path} was trained without --segmentation_guided True"
                )
        return None
    dropped = _parse_classes(settings.ablate_classes, trained.model.num_segmentation_classes)
    if not trained.model.use_ablated_segmentations and (dropped or not settings.seg_dir):
        asked = "--ablate_classes" if dropped else "without --seg_dir"
        raise UserError(
            f"{asked}: {trained.path} was trained without --use_ablated_segmentations True"
            " and cannot sample with unspecified classes"
        )
    if not settings.seg_dir:
        if dropped:
            raise UserError("--ablate_classes: there are no masks, --seg_dir is missing")
        return None
    folder = split_folder(settings.seg_dir, settings.seg_split)
    paths = list_images(folder)
    names = name_images(folder, paths)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{folder} holds several masks with the name {twice[0]}")
    ignore = ignored_values(settings.ignore_index)
    for path in paths:
        read_mask(path, trained.model.num_segmentation_classes, ignore)
    per_mask = settings.samples_per_mask
    return GuidingMasks(tuple(names), tuple(paths), per_mask, dropped, ignore, trained)


def _parse_classes(text: str, classes: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part) < classes for part in parts):
        raise UserError(f"--ablate_classes {text}: expected numbers from 1 to {classes - 1}")
    return tuple(sorted({int(part) for part in parts}))


def _guided_job(
    settings: GuidedSampleConfig,
    trained: Trained,
    labels: Labels | None,
    masks: GuidingMasks,
    overrides: Overrides,
) -> SampleJob:
    """The job for the images of all masks, at most --num_samples.

    :raises UserError: if the network does not support the guidance that the flags ask for.
    """
    names = masks.image_names()
    count = min(settings.num_samples, len(names))
    network = trained.network(dist_util.dev())
    if settings.guidance_scale != 1 and trained.model.use_ablated_segmentations:
        model: Callable[..., th.Tensor] = ClassifierFree(
            network, settings.guidance_scale, 0, "cond"
        )
    else:
        model = guided(network, settings, trained)
    return SampleJob(
        dataclasses.replace(settings, num_samples=count),
        trained,
        model,
        labels,
        masks.conditions,
        also=masks.identity(),
        names=names,
        prepare=partial(masks.write, count),
        defaults=said_of_defaults({**overrides, "num_samples": count}),
    )
