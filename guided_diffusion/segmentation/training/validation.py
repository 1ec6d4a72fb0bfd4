"""A network's scores on labelled images, as training sees them: at their size in memory."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch as th

from guided_diffusion.images.reading import normalize
from guided_diffusion.segmentation.metrics import confusion_matrix, present_scores
from guided_diffusion.segmentation.networks.padding import sliding_scores
from guided_diffusion.segmentation.training.dataset import LabelledImages

# makes the context in which a network runs
Autocast = Callable[[], contextlib.AbstractContextManager[None]]


@th.no_grad()
def scored_batches(
    model: th.nn.Module,
    data: LabelledImages,
    forward_size: int,
    autocast: Autocast = contextlib.nullcontext,
) -> Iterator[tuple[th.Tensor, th.Tensor]]:
    """Scores `[N x classes x H x W]` and true masks int64 `[N x H x W]`, on the network's device.

    :param model: in evaluation mode.
    :param forward_size: images per forward pass of training. Without gradients, activations are
        not kept, so four times as many are taken; images that are read in windows one by one.
    """
    device = next(model.parameters()).device
    size = 1 if data.window else 4 * forward_size
    for first in range(0, len(data), size):
        with autocast():
            if data.window:
                images = normalize(data.images[first])[None].to(device)
                masks = th.from_numpy(data.masks[first])[None].long()
                scores = sliding_scores(model, images, data.window)
            else:
                images, masks = data.batch(range(first, min(first + size, len(data))))
                scores = model(images.to(device))
        yield scores, masks.to(device)


def count_pixels(scores: th.Tensor, masks: th.Tensor) -> np.ndarray:
    """The confusion matrix `[classes x classes]` of a batch, by the highest score."""
    predicted, true = scores.argmax(1).cpu().numpy(), masks.cpu().numpy().astype(np.uint8)
    return confusion_matrix(predicted, true, scores.shape[1])


def mean_iou(model: th.nn.Module, data: LabelledImages, forward_size: int) -> float:
    """Mean IoU of the foreground classes that the masks show; see `scored_batches`."""
    counts = [count_pixels(*batch) for batch in scored_batches(model.eval(), data, forward_size)]
    return present_scores(np.sum(counts, axis=0)).mean_iou()
