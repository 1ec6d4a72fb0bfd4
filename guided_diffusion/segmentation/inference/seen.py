"""Radiographs as a model sees them, to choose among: how certain it is, and what it finds where."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch as th
import torch.nn.functional as F

from guided_diffusion.images.duplicates import fingerprint
from guided_diffusion.segmentation.inference.predictor import Segmenter
from guided_diffusion.segmentation.inference.results import Item
from guided_diffusion.segmentation.inference.uncertainty import uncertainty_of
from guided_diffusion.segmentation.pipeline import in_batches, prefetch
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.selection.next_to_label import Seen

# fields along each side of the radiograph
_GRID = 8


def see(item: Item, image: np.ndarray, prediction: Prediction) -> Seen:
    """What is kept of a prediction.

    Its vector holds the mean probability of every class but the background in the fields of a
    grid, which networks of all kinds and their averages have.

    :param image: as `Segmenter.read` returns it.
    """
    probabilities = th.from_numpy(prediction.probabilities[1:])
    vector = F.adaptive_avg_pool2d(probabilities, _GRID).flatten().numpy()
    digest = fingerprint(image).digest
    return Seen(item.name, item.path, uncertainty_of(prediction), vector, digest)


def look(predictor: Segmenter, items: Sequence[Item], batch_size: int) -> Iterator[Seen]:
    """Predict radiographs for `see` alone.

    :raises ImageError: if a file cannot be read.
    """

    def read(item: Item) -> tuple[Item, np.ndarray]:
        return item, predictor.read(item.path)

    for batch in in_batches(prefetch(read, items, ahead=batch_size), batch_size):
        started = predictor.start([image for _, image in batch])
        for (item, image), finish in zip(batch, started):
            yield see(item, image, finish())
