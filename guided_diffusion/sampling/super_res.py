"""Sampling with a super-resolution network."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
import torch as th

from guided_diffusion import dist_util, image_datasets
from guided_diffusion.images.files import list_images
from guided_diffusion.images.reading import ReadingConfig, normalize
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.runtime.command_line.flags import Overrides
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.config import (
    SuperResSampleConfig,
    said_of_defaults,
    sample_settings,
)
from guided_diffusion.sampling.images import read_npz
from guided_diffusion.sampling.job import SampleJob, as_flags_say, class_labels, guided


def super_res_job(overrides: Overrides) -> SampleJob:
    """The job of `super_res_sample.py`.

    :param overrides: the flags given on the command line.
    :raises UserError: if the small images are missing or do not suit the network.
    """
    settings = sample_settings(SuperResSampleConfig, overrides)
    trained = read_trained(settings.model_path, overrides, "super_res")
    trained = as_flags_say(trained, settings)
    small, own_labels = load_base_samples(
        settings.base_samples, trained.reading, trained.model.small_size, trained.classes
    )
    settings = sample_settings(SuperResSampleConfig, overrides, len(small))
    labels = class_labels(settings, trained)
    if labels and own_labels and not labels.chosen:
        labels = dataclasses.replace(labels, chosen=tuple(own_labels))
    model = guided(trained.network(dist_util.dev()), settings, trained)

    def conditions(indices: Sequence[int]) -> dict[str, th.Tensor]:
        return {"low_res": small[[k % len(small) for k in indices]].to(dist_util.dev())}

    also = {"base_samples": zlib.crc32(small.numpy().tobytes())}
    said = said_of_defaults({**overrides, "num_samples": settings.num_samples})
    return SampleJob(settings, trained, model, labels, conditions, also=also, defaults=said)


def load_base_samples(
    path: str, reading: ReadingConfig, small_size: int, classes: Sequence[str]
) -> tuple[th.Tensor, list[int] | None]:
    """Load the low-resolution images, with their class labels if known.

    :param path: an .npz file from a sampling script, or a folder or glob of images.
    :param reading: how image files are read.
    :param small_size: height and width of the low-resolution images, in pixels.
    :param classes: names of the network's classes; image files have labels if every file name
        starts with one of them.
    :return: float32 `[N x C x small_size x small_size]` in [-1, 1], and N labels or None.
    :raises UserError: if there are no images, or their size or number of channels is wrong.
    """
    if not path:
        raise UserError("--base_samples is missing: name an .npz file or a folder of small images")
    if path.endswith(".npz"):
        images, labels = read_npz(path)
    else:
        reading = dataclasses.replace(reading, image_size=small_size)
        paths = list_images(path)
        images = np.stack([reading.load(file) for file in paths])
        try:
            labels = image_datasets.class_labels(paths, classes) if classes else None
        except UserError:
            labels = None
    wanted = (small_size, small_size, reading.in_channels)
    if images.shape[1:] != wanted:
        found, needed = ("x".join(map(str, shape)) for shape in (images.shape[1:], wanted))
        raise UserError(
            f"--base_samples {path}: the images are {found}, the network takes {needed}"
        )
    return normalize(images), labels
