"""Predicted and true masks of the same radiographs, from files or from a model."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import pixel_spacing, read_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.inference.predictor import Predictor
from guided_diffusion.segmentation.pipeline import in_batches, prefetch
from guided_diffusion.segmentation.prediction import Prediction

Spacing = tuple[float, float] | None


@dataclass(frozen=True)
class MaskPair:
    """One radiograph's masks, uint8 [H x W].

    spacing: size of a pixel in mm (height, width). image: the radiograph, where it was read.
    prediction: what the model said, where one was asked.
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
    num_classes: int | None,
    binary: bool = False,
    spacing: Spacing = None,
    read: Callable[[str], np.ndarray] | None = None,
    images: str = "",
) -> Iterator[MaskPair]:
    """The masks of two folders, or of two files, paired by name.

    A folder that predict.py wrote may be given as it is: its MASK folder is meant.

    :param read: how to read the radiographs under `images`, whose pixels may have a size too.
    """
    if os.path.isdir(os.path.join(predictions, "MASK")):
        predictions = os.path.join(predictions, "MASK")
    paths = pair_paths(predictions, truths)
    image_of = {name: path for name, path, _ in pair_paths(images, truths)} if images else {}

    def load(item: tuple[str, str, str]) -> MaskPair:
        name, predicted_path, true_path = item
        masks = [read_true_mask(p, num_classes, binary) for p in (predicted_path, true_path)]
        _same_size(predicted_path, masks[0], true_path, masks[1])
        size, image = pixel_spacing(true_path), None
        if name in image_of:
            size = size or pixel_spacing(image_of[name])
            image = read(image_of[name]) if read else None
        return MaskPair(name, *masks, size or spacing, image)

    return _progress(prefetch(load, paths), len(paths))


def predict_mask_pairs(
    predictor: Predictor,
    images: str,
    truths: str,
    binary: bool = False,
    spacing: Spacing = None,
    batch_size: int = 8,
) -> Iterator[MaskPair]:
    """A model's predictions for radiographs that have masks."""
    paths = pair_paths(images, truths)

    def load(item: tuple[str, str, str]) -> tuple:
        _, image_path, true_path = item
        image = predictor.read(image_path)
        true = read_true_mask(true_path, len(predictor.categories), binary)
        _same_size(image_path, image[..., 0] if image.ndim == 3 else image, true_path, true)
        return item, image, true, pixel_spacing(image_path) or spacing

    def started() -> Iterator[tuple]:
        for batch in in_batches(prefetch(load, paths, ahead=batch_size), batch_size):
            finishers = predictor.start([image for _, image, _, _ in batch])
            yield from zip(batch, finishers)

    def finish(item: tuple) -> MaskPair:
        ((name, _, _), image, true, size), complete = item
        prediction = complete()
        return MaskPair(name, prediction.mask(), true, size, image, prediction)

    return _progress(prefetch(finish, started(), ahead=3), len(paths))


def read_true_mask(path: str, num_classes: int | None, binary: bool) -> np.ndarray:
    """A mask of class indices; where only "binary" matters any value is fine."""
    if binary:
        return read_mask(path)
    mask = read_mask(path, num_classes)
    if num_classes is None and mask.max() == 255:
        raise UserError(
            f"{path} holds the value 255, which no class has. A black-and-white mask? Compare with "
            "--binary True, or convert it with tools/prepare_data.py --action validate --fix-issues"
        )
    return mask


def pair_paths(first: str, second: str) -> list[tuple[str, str, str]]:
    """(name, path, path) of two folders' files, or of two files whatever their names."""
    for path in (first, second):
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist")
    if os.path.isfile(first) and os.path.isfile(second):
        return [(os.path.splitext(os.path.basename(second))[0], first, second)]
    if os.path.isfile(first) or os.path.isfile(second):
        raise UserError(f"{first} and {second}: give two folders or two files")
    return pair_files(first, second)


def _same_size(first: str, one: np.ndarray, second: str, other: np.ndarray) -> None:
    if one.shape != other.shape:
        sizes = ["x".join(map(str, mask.shape)) for mask in (one, other)]
        raise UserError(
            f"{first} is {sizes[0]} and {second} {sizes[1]} pixels (height x width); "
            "masks must have the size of their radiograph"
        )


def _progress(pairs: Iterable[MaskPair] | Sequence[MaskPair], total: int) -> Iterator[MaskPair]:
    yield from tqdm(pairs, desc="evaluating", unit="image", total=total, disable=None, leave=False)
