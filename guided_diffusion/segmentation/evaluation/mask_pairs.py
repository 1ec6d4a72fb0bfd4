"""Predicted and true masks of the same radiographs, from files or from a model."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from guided_diffusion.images.decoded import PixelSize
from guided_diffusion.images.files import list_images, name_images, pair_files
from guided_diffusion.images.image_io import ImageError, check_images, pixel_spacing, read_image
from guided_diffusion.images.masks import MaskRule, resembles_radiograph
from guided_diffusion.images.names import is_pattern, stem
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import begin_work, warn
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.storage.files import expand_path
from guided_diffusion.segmentation.inference.predictor import Finish, Segmenter
from guided_diffusion.segmentation.pipeline import in_batches, prefetch
from guided_diffusion.segmentation.prediction import Prediction

Spacing = PixelSize | None


@dataclass(frozen=True)
class MaskPair:
    """One radiograph's masks, uint8 [H x W].

    spacing: the size of a pixel. image: the radiograph, if it was read. prediction:
    the model's, if a model made the predicted mask.
    """

    name: str
    predicted: np.ndarray
    true: np.ndarray
    spacing: Spacing = None
    image: np.ndarray | None = None
    prediction: Prediction | None = None


def read_mask_pairs(
    predictions: str,
    truths: str,
    rule: MaskRule,
    spacing: Spacing = None,
    images: str = "",
) -> Iterator[MaskPair]:
    """The masks of two folders, or of two files, paired by name.

    :param predictions: may also be an output folder of predict.py, whose MASK folder is read.
    :param rule: what the values of the masks mean.
    :param spacing: of files that do not record the size of a pixel in the patient.
    :param images: the radiographs, if they are to be read; they may record the spacing too.
    """
    if os.path.isdir(os.path.join(predictions, "MASK")):
        predictions = os.path.join(predictions, "MASK")
    if os.path.isdir(truths) and os.path.realpath(predictions) == os.path.realpath(truths):
        warn(f"{truths} is compared with itself")
        own = list_images(truths)
        paths = list(zip(name_images(truths, own), own, own))
    else:
        paths = pair_paths(predictions, truths)
    _check_masks(paths[0][1], paths[0][2], rule)
    image_of = {name: path for name, path, _ in pair_paths(images, truths)} if images else {}
    check_images([path for _, *both in paths for path in both] + list(image_of.values()))

    def load(item: tuple[str, str, str]) -> MaskPair:
        name, predicted_path, true_path = item
        predicted, true = rule.read(predicted_path), rule.read(true_path)
        _check_same_size(predicted_path, predicted, true_path, true)
        sizes, image = [pixel_spacing(true_path)], None
        if name in image_of:
            sizes.append(pixel_spacing(image_of[name]))
            image = read_image(image_of[name])
        return MaskPair(name, predicted, true, _in_patient(*sizes, spacing), image)

    return _progress(prefetch(load, paths), len(paths))


def predict_mask_pairs(
    predictor: Segmenter,
    images: str,
    truths: str,
    rule: MaskRule,
    spacing: Spacing = None,
    batch_size: int = 8,
) -> Iterator[MaskPair]:
    """A model's predictions for radiographs that have masks.

    :param rule: what the values of the masks mean.
    :param spacing: of files that do not record the size of a pixel in the patient.
    """
    paths = pair_paths(images, truths)
    check_images([path for _, *both in paths for path in both])

    def load(item: tuple[str, str, str]) -> _Labelled:
        name, image_path, true_path = item
        image = predictor.read(image_path)
        true = rule.read(true_path)
        _check_same_size(image_path, image[..., 0] if image.ndim == 3 else image, true_path, true)
        return _Labelled(name, image, true, _in_patient(pixel_spacing(image_path), spacing))

    def started() -> Iterator[tuple[_Labelled, Finish]]:
        for batch in in_batches(prefetch(load, paths, ahead=batch_size), batch_size):
            yield from zip(batch, predictor.start([labelled.image for labelled in batch]))

    def finish(item: tuple[_Labelled, Finish]) -> MaskPair:
        (name, image, true, size), complete = item
        prediction = complete()
        return MaskPair(name, prediction.mask(), true, size, image, prediction)

    return _progress(prefetch(finish, started(), ahead=3), len(paths))


class _Labelled(NamedTuple):
    """A radiograph with its true mask."""

    name: str
    image: np.ndarray
    true: np.ndarray
    spacing: Spacing


def pair_paths(first: str, second: str) -> list[tuple[str, str, str]]:
    """(name, path, path) of two folders' files paired by name, or of two files of any names."""
    first, second = expand_path(first), expand_path(second)
    for path in (first, second):
        if not (os.path.exists(path) or is_pattern(path)):
            raise UserError(f"{path} does not exist")
    if os.path.isfile(first) and os.path.isfile(second):
        return [(stem(os.path.basename(second)), first, second)]
    if os.path.isfile(first) or os.path.isfile(second):
        raise UserError(f"{first} and {second}: give two folders or two files")
    return pair_files(first, second)


def _check_masks(predicted: str, true: str, rule: MaskRule) -> None:
    """:raises UserError: if either of the first two files is, or may be, a radiograph."""
    remedy = "name the model that is to predict with --model, or the folder of its masks"
    if resembles_radiograph(predicted):
        raise UserError(
            f"{predicted} looks like a radiograph, where predicted masks are expected: {remedy}"
        )
    if resembles_radiograph(true):
        raise UserError(
            f"{true} looks like a radiograph, where true masks are expected: name their folder"
            " as the last argument"
        )
    if predicted.lower().endswith((".jpg", ".jpeg")):
        try:
            rule.read(predicted)
        except ImageError as error:
            raise ImageError(f"{error} If it is a radiograph, {remedy}") from error


def _in_patient(*sizes: Spacing) -> Spacing:
    """The first size of a pixel in the patient, else the first at the detector."""
    known = [size for size in sizes if size]
    return next((size for size in known if not size.at_detector), known[0] if known else None)


def _check_same_size(first: str, one: np.ndarray, second: str, other: np.ndarray) -> None:
    if one.shape != other.shape:
        sizes = ["x".join(map(str, mask.shape)) for mask in (one, other)]
        raise UserError(
            f"{first} is {sizes[0]} and {second} {sizes[1]} pixels (height x width); "
            "a mask must have the size of its radiograph"
        )


def _progress(pairs: Iterable[MaskPair], total: int) -> Iterator[MaskPair]:
    # nothing is said before, so that an error in the first file remains a single line
    with progress_bar(total, "image", desc="evaluating", leave=False, delay=2) as bar:
        for pair in pairs:
            begin_work()
            yield pair
            bar.update()
