"""Many images at once: the .npz files of the sampling scripts."""

import blobfile as bf
import numpy as np

from .errors import UserError


def read_npz(path: str) -> tuple[np.ndarray, list[int] | None]:
    """The images uint8 `[N x H x W x C]` of a file that a sampling script wrote, and their labels.

    :raises UserError: if it is no such file.
    """
    try:
        with bf.BlobFile(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays["arr_0"]
            labels = arrays["arr_1"].tolist() if "arr_1" in arrays else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no .npz file of a sampling script: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise UserError(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}, not uint8 [N x H x W x C]"
        )
    return images, labels
