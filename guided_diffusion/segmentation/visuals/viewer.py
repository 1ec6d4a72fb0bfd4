"""A window that shows a radiograph and its classes side by side."""

import os
import sys
from collections.abc import Sequence

import numpy as np

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.visuals.render import overlay


def show(name: str, image: np.ndarray, mask: np.ndarray, categories: Sequence[Category]) -> None:
    """Open a window and wait until it is closed.

    :raises UserError: where there is no screen.
    """
    import matplotlib.pyplot as plt

    interactive = plt.get_backend().lower() not in ("agg", "pdf", "svg", "ps", "template")
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not interactive or (sys.platform.startswith("linux") and not screen):
        raise UserError("--viz needs a screen: leave it out and look at OUTPUT/OVERLAY instead")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    figure.suptitle(name)
    left.imshow(image, cmap="gray")
    right.imshow(overlay(image, mask, categories, legend=True))
    for axes in (left, right):
        axes.set_axis_off()
    plt.show()
