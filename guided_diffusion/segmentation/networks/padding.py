"""Images of any size: padding them to the multiples that a network needs, or sliding a window."""

from collections.abc import Callable, Sequence

import torch as th
import torch.nn.functional as F

# overlap of neighbouring windows as a share of their side
OVERLAP = 0.5


def pad_to_multiple(images: th.Tensor, multiple: int) -> th.Tensor:
    """Repeat the last row and column of `[N x C x H x W]` until `multiple` divides both sides."""
    missing = [-side % multiple for side in images.shape[2:]]
    if not any(missing):
        return images
    return F.pad(images, [0, missing[1], 0, missing[0]], mode="replicate")


def crop_to(scores: th.Tensor, images: th.Tensor) -> th.Tensor:
    """Undo the padding: scores `[N x C x H' x W']` at the size of the images `[... x H x W]`."""
    return scores[..., : images.shape[-2], : images.shape[-1]]


def margins(size: Sequence[int], window: Sequence[int]) -> list[tuple[int, int]]:
    """Pixels to add before and after each side so that an image fills the window, centred.

    :param size: height and width of the image; :param window: those of the window.
    """
    missing = [max(0, wanted - side) for side, wanted in zip(size, window)]
    return [(pixels // 2, pixels - pixels // 2) for pixels in missing]


def sliding_scores(
    model: Callable[[th.Tensor], th.Tensor], images: th.Tensor, window: tuple[int, int]
) -> th.Tensor:
    """Class scores of images at their own size, blended from overlapping windows.

    :param images: `[N x C x H x W]` in [-1, 1]; images smaller than the window are centred on
        black, as in training.
    :param window: height and width of what the network sees at once.
    :return: `[N x classes x H x W]`.
    """
    from monai.inferers import sliding_window_inference  # importing monai takes seconds

    height, width = images.shape[-2:]
    rows, columns = margins((height, width), window)
    padded = F.pad(images, [*columns, *rows], value=-1)
    scores = sliding_window_inference(padded, window, 4, model, OVERLAP, mode="gaussian")
    if not isinstance(scores, th.Tensor):
        raise TypeError(f"the network returned {type(scores).__name__}, not one tensor of scores")
    return scores[..., rows[0] : rows[0] + height, columns[0] : columns[0] + width]
