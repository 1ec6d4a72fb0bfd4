"""A segmentation model and a radiograph to class probabilities at the radiograph's size."""

from collections.abc import Callable, Sequence

import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.image_io import read_image
from guided_diffusion.reading import normalize, to_uint8_channels
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model
from guided_diffusion.unet import SegmentationUNetModel

# overlap of neighbouring sliding windows, as a share of their side
OVERLAP = 0.5


class Predictor:
    """Segments radiographs as the model file says they must be read.

    :param model: the network, in eval mode.
    :param config: what the model file says of it.
    :param device: where to compute.
    """

    def __init__(
        self,
        model: SegmentationUNetModel,
        config: SegmentationConfig,
        device: th.device | str = "cpu",
    ):
        self.model = model.to(device).eval()
        self.config = config
        self.device = th.device(device)

    @property
    def categories(self) -> tuple[Category, ...]:
        return self.config.categories

    def read(self, path: str) -> np.ndarray:
        """A radiograph under the model's intensity rule, at its own size."""
        reading = self.config.reading
        return read_image(path, reading.in_channels, reading.intensity_rule())

    def probabilities(self, path: str) -> np.ndarray:
        """Class probabilities of a file: float32 `[C x H x W]` at its own size.

        :raises ImageError: if the file cannot be read.
        """
        return self.segment([self.read(path)])[0]

    @th.inference_mode()
    def segment(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Class probabilities of images as `read` returns them, which may differ in size.

        :return: float32 `[C x H x W]` for each, at its own size.
        """
        reading = self.config.reading
        if not images:
            return []
        if reading.resize == "native":
            return [self._sliding(image) for image in images]
        prepared = normalize(np.stack([reading.prepare(image) for image in images]))
        small = self.model(prepared.to(self.device)).float().softmax(1).cpu().numpy()
        geometry = reading.geometry()
        return [
            geometry.invert_probabilities(probabilities, image.shape[:2])
            for probabilities, image in zip(small, images)
        ]

    def _sliding(self, image: np.ndarray) -> np.ndarray:
        reading = self.config.reading
        whole = normalize(to_uint8_channels(image, reading.in_channels))[None].to(self.device)
        scores = sliding_scores(self.model, whole, reading.geometry().height_width)
        return scores[0].float().softmax(0).cpu().numpy()


def sliding_scores(
    model: Callable[[th.Tensor], th.Tensor], images: th.Tensor, window: tuple[int, int]
) -> th.Tensor:
    """Class scores of images at their own size, blended from overlapping windows.

    :param images: `[N x C x H x W]` in [-1, 1]; smaller ones than the window are padded inside.
    :param window: height and width of what the network sees at once.
    :return: `[N x classes x H x W]`.
    """
    from monai.inferers import sliding_window_inference  # importing monai takes seconds

    return sliding_window_inference(images, window, 4, model, OVERLAP, mode="gaussian")


def load_predictor(model_path: str, device: th.device | str | None = None) -> Predictor:
    """A predictor from a model file that scripts/finetune.py wrote.

    :param device: by default CUDA where there is one.
    :raises UserError: if the file is no segmentation model.
    """
    model, config, _ = load_model(model_path)
    return Predictor(model, config, device or dist_util.dev())
