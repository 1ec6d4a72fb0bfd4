"""Evaluate samples against reference images: metrics, and nearest neighbours to spot copies."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import blobfile as bf
import numpy as np
import torch as th
import torch.nn.functional as F

from guided_diffusion.images.files import list_images, list_radiographs
from guided_diffusion.images.image_io import read_image, write_image
from guided_diffusion.images.names import stem
from guided_diffusion.images.reading import ReadingConfig, normalize, to_uint8_channels
from guided_diffusion.networks.precision import choose_for
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.storage.files import check_output, read_sections, save_json, write_csv
from guided_diffusion.sampling.config import EvaluateSamplesConfig
from guided_diffusion.sampling.features import (
    Extractor,
    ddpm_features,
    torchvision_features,
)
from guided_diffusion.sampling.folder import SETTINGS_NAME
from guided_diffusion.sampling.images import read_npz
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.sampling.quality import (
    Neighbours,
    copying,
    frechet_distance,
    manifold_metrics,
    nearest_real,
)

# images are downsampled to at most this size for pixel distances
_PIXEL_SIDE = 32
# samples per page of nearest neighbours, and per row
_PAGE, _TRIPLES_A_ROW = 32, 4


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images, uint8 `[N x H x W x C]`, with a name for each."""

    source: str
    images: np.ndarray
    names: Sequence[str]


def evaluate(
    samples_path: str, reference_path: str, overrides: Overrides, device: th.device
) -> None:
    """Compare samples with real images; write metrics.json, nearest.csv and nearest/page_*.png.

    :param samples_path: .npz file or folder from a sampling script, or folder or glob of images.
    :param reference_path: the real images: folder, glob or .npz file.
    :param overrides: the flags given on the command line.
    :raises UserError: if the two sets or the flags do not fit together.
    """
    settings = from_flags(EvaluateSamplesConfig, overrides)
    folder = settings.out_dir or _folder_beside(samples_path, settings.features)
    precision, note = choose_for(device, settings.precision)
    check_output(folder, folder=True)
    trained = None
    if settings.features == "ddpm":
        trained = read_trained(settings.model_path, {})
    samples = load_samples(samples_path)
    reading = reference_reading(samples_path, samples.images.shape, overrides, trained)
    reference = load_reference(reference_path, reading)
    fewest = min(len(samples.images), len(reference.images) // 2)
    if not 1 <= settings.nearest_k < fewest:
        raise UserError(
            f"--nearest_k {settings.nearest_k} with {len(samples.images)} samples and"
            f" {len(reference.images)} reference images: it must be from 1 to {fewest - 1}"
        )
    if trained is not None:
        _check_channels(samples, trained)
        extractor = ddpm_features(trained, settings.feature_timestep, device)
    else:
        extractor = torchvision_features(settings.features, settings.weights, device)
    if note:
        say(note)
    extractor = extractor.in_precision(precision, device)
    results, neighbours = compare(samples, reference, extractor, settings, device)
    save_json(bf.join(folder, "metrics.json"), results)
    write_neighbours(folder, samples, reference, neighbours)
    print(report(results))
    print(f"results: {folder}")


def _folder_beside(samples_path: str, features: str) -> str:
    inside = bf.isdir(samples_path)
    return bf.join(
        samples_path if inside else bf.dirname(samples_path) or ".", f"evaluation_{features}"
    )


def _check_channels(samples: ImageSet, trained: Trained) -> None:
    channels = samples.images.shape[3]
    if channels != trained.model.in_channels:
        raise UserError(
            f"{samples.source} holds images of {channels} channels, the network {trained.path}"
            f" takes {trained.model.in_channels}"
        )


def load_samples(path: str) -> ImageSet:
    """Load the samples.

    :raises UserError: if there are none, or their sizes differ.
    """
    if path.endswith(".npz"):
        images, _ = read_npz(path)
        return ImageSet(path, images, [str(number) for number in range(len(images))])
    if bf.exists(bf.join(path, SETTINGS_NAME)):
        path = bf.join(path, "png")
    paths = list_images(path)
    arrays = [read_image(file) for file in paths]
    for file, array in zip(paths, arrays):
        if array.shape != arrays[0].shape:
            raise UserError(
                f"{file} is of shape {array.shape}, {paths[0]} of {arrays[0].shape}: samples must"
                " be of one size"
            )
    channels = 1 if arrays[0].ndim == 2 else 3
    images = np.stack([to_uint8_channels(array, channels) for array in arrays])
    return ImageSet(path, images, [stem(bf.basename(file)) for file in paths])


def reference_reading(
    samples_path: str, shape: Sequence[int], overrides: Overrides, trained: Trained | None
) -> ReadingConfig:
    """How to read reference images: as the sampled network's training images were, if known."""
    folder = samples_path if bf.isdir(samples_path) else bf.dirname(samples_path)
    record = bf.join(folder, SETTINGS_NAME) if folder else SETTINGS_NAME
    if bf.exists(record):
        base = ReadingConfig.from_dict(read_sections(record, "reading")["reading"])
    elif trained is not None:
        base = trained.reading
    else:
        base = ReadingConfig()
    _, height, width, channels = shape
    size = height if height == width else (height, width)
    reading = from_flags(ReadingConfig, overrides, base)
    return dataclasses.replace(reading, image_size=size, in_channels=channels)


def load_reference(path: str, reading: ReadingConfig) -> ImageSet:
    """Load the real images at the samples' size.

    :raises UserError: if an .npz file holds images of another size.
    """
    if path.endswith(".npz"):
        images, _ = read_npz(path)
        height, width = reading.geometry().height_width
        if images.shape[1:] != (height, width, reading.in_channels):
            raise UserError(
                f"{path} holds images of shape {images.shape[1:]}, the samples are of"
                f" {(height, width, reading.in_channels)}"
            )
        return ImageSet(path, images, [f"{path}[{number}]" for number in range(len(images))])
    paths, note = list_radiographs(path)
    if note:
        say(f"{path}: {note}")
    with ThreadPoolExecutor() as pool, progress_bar(len(paths), "image", desc="reading") as bar:
        loaded = []
        for image in pool.map(reading.load, paths):
            loaded.append(image)
            bar.update()
    return ImageSet(path, np.stack(loaded), paths)


def compare(
    samples: ImageSet,
    reference: ImageSet,
    extractor: Extractor,
    settings: EvaluateSamplesConfig,
    device: th.device,
) -> tuple[dict[str, Any], dict[str, Neighbours]]:
    """All metrics, and each sample's nearest reference images by features and by pixels."""
    real = extractor(reference.images, settings.batch_size, device)
    fake = extractor(samples.images, settings.batch_size, device)
    neighbours = {
        "features": nearest_real(real, fake),
        "pixels": nearest_real(_pixels(reference.images), _pixels(samples.images)),
    }
    # the attainable values: hold out as many real images and evaluate them as if samples
    order = np.random.default_rng(0).permutation(len(real))
    count = min(len(fake), len(real) // 2)
    held_out, others = real[order[:count]], real[order[count:]]
    results = {
        "features": extractor.name,
        "dimensions": real.shape[1],
        "samples": {"source": samples.source, "count": len(fake)},
        "reference": {"source": reference.source, "count": len(real)},
        "nearest_k": settings.nearest_k,
        "of_samples": _figures(real, fake, neighbours["features"], settings.nearest_k),
        "of_real_images": {
            "count": count,
            **_figures(others, held_out, nearest_real(others, held_out), settings.nearest_k),
        },
    }
    return results, neighbours


def _figures(real: np.ndarray, fake: np.ndarray, nearest: Neighbours, k: int) -> dict[str, float]:
    return {
        **manifold_metrics(real, fake, k),
        "frechet_distance": frechet_distance(real, fake),
        "nearest_distance": copying(real, nearest),
    }


def _pixels(images: np.ndarray) -> np.ndarray:
    """Area-downsampled images as pixel vectors `[N x D]` in [0, 255]."""
    planes = (normalize(images) + 1) * 127.5
    side = [min(_PIXEL_SIDE, length) for length in planes.shape[2:]]
    return F.interpolate(planes, side, mode="area").flatten(1).numpy()


def report(results: Mapping[str, Any]) -> str:
    """The metrics as a printable table."""
    samples, real = results["of_samples"], results["of_real_images"]
    lines = [
        f"features: {results['features']}",
        f"{results['samples']['count']} samples against {results['reference']['count']} real"
        f" images; beside it {real['count']} real images against the others",
        f"{'':20}{'samples':>12}{'real images':>14}",
    ]
    for name in samples:
        lines.append(f"{name.replace('_', ' '):20}{samples[name]:12.4g}{real[name]:14.4g}")
    if results["samples"]["count"] <= results["dimensions"]:
        lines.append(
            f"no more samples than features ({results['dimensions']}): the frechet distance"
            " depends on their number, compare it with that of the real images alone"
        )
    return "\n".join(lines)


def write_neighbours(
    folder: str, samples: ImageSet, reference: ImageSet, neighbours: Mapping[str, Neighbours]
) -> None:
    """Write nearest.csv and pages showing each sample with its nearest reference images.

    Each sample is followed by its nearest by features and by pixels. Samples are sorted by pixel
    distance, so that likely copies come first.
    """
    by_features, by_pixels = neighbours["features"], neighbours["pixels"]
    shape = samples.images.shape
    pixels = min(_PIXEL_SIDE, shape[1]) * min(_PIXEL_SIDE, shape[2]) * shape[3]
    difference = by_pixels.distance / np.sqrt(pixels)
    order = np.argsort(difference, kind="stable")
    rows = [
        (
            samples.names[k],
            reference.names[by_features.index[k]],
            f"{by_features.distance[k]:.6g}",
            reference.names[by_pixels.index[k]],
            f"{difference[k]:.3f}",
        )
        for k in order
    ]
    header = ["sample", "nearest_by_features", "distance", "nearest_by_pixels", "rms_difference"]
    write_csv(bf.join(folder, "nearest.csv"), header, rows)
    for page, first in enumerate(range(0, len(order), _PAGE)):
        images, captions = [], []
        for k in order[first : first + _PAGE]:
            images.append(samples.images[k])
            images.append(reference.images[by_features.index[k]])
            images.append(reference.images[by_pixels.index[k]])
            captions += [f"sample {samples.names[k]}", "by features", f"pixels {difference[k]:.1f}"]
        picture = image_grid(np.stack(images), captions, columns=3 * _TRIPLES_A_ROW)
        write_image(bf.join(folder, "nearest", f"page_{page:03d}.png"), picture)
