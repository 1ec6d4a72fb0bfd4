"""Sliding windows: networks on images larger than those they were trained on."""

from collections.abc import Callable

import torch as th

# overlap of neighbouring windows as a share of their side
OVERLAP = 0.5


def sliding_scores(
    model: Callable[[th.Tensor], th.Tensor], images: th.Tensor, window: tuple[int, int]
) -> th.Tensor:
    """Class scores of images at their own size, blended from overlapping windows.

    :param images: `[N x C x H x W]` in [-1, 1]; images smaller than the window are padded.
    :param window: height and width of what the network sees at once.
    :return: `[N x classes x H x W]`.
    """
    from monai.inferers import sliding_window_inference  # importing monai takes seconds

    scores = sliding_window_inference(images, window, 4, model, OVERLAP, mode="gaussian")
    if not isinstance(scores, th.Tensor):
        raise TypeError(f"the network returned {type(scores).__name__}, not one tensor of scores")
    return scores
