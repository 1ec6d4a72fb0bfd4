"""Segmentation models and a radiograph to class probabilities at the radiograph's size."""

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.reading import normalize, to_uint8_channels
from guided_diffusion.images.swaps import parse_swaps
from guided_diffusion.networks.precision import check_precision, in_precision, store_weights
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import ClassTable, check_same_classes, check_swaps
from guided_diffusion.segmentation.inference.uncertainty import EnsembleMean, entropy_map
from guided_diffusion.segmentation.inference.views import View, mirrors, views_for
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model
from guided_diffusion.segmentation.networks.kind import Member, MemberOptions, Network
from guided_diffusion.segmentation.networks.padding import sliding_scores
from guided_diffusion.segmentation.prediction import Prediction

# completes the prediction of one radiograph; any thread may call it
Finish = Callable[[], Prediction]


class Segmenter(ABC):
    """Reads radiographs and predicts their classes.

    :param config: how radiographs are read, and what the classes are.
    """

    def __init__(self, config: SegmentationConfig):
        self.config = config

    @property
    def categories(self) -> ClassTable:
        return self.config.categories

    def read(self, path: str) -> np.ndarray:
        """A radiograph under the model's intensity rule, at its own size.

        :raises ImageError: if the file cannot be read.
        """
        reading = self.config.reading
        return read_image(path, reading.in_channels, reading.intensity_rule())

    def probabilities(self, path: str) -> np.ndarray:
        """Class probabilities of a file: float32 `[C x H x W]` at its own size.

        :raises ImageError: if the file cannot be read.
        """
        return self.segment([self.read(path)])[0]

    def segment(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Class probabilities of images as `read` returns them, which may differ in size.

        :return: float32 `[C x H x W]` for each, at its own size.
        """
        return [finish().probabilities for finish in self.start(images)]

    @abstractmethod
    def start(self, images: Sequence[np.ndarray]) -> list[Finish]:
        """Run the network on all images at once, which may differ in size.

        :return: for each image a function that does the rest of the work. Any thread may call it:
            results at full size are large, and need not all exist at the same time.
        """


class Predictor(Segmenter):
    """One model file: its network, and how the file says radiographs must be read.

    :param model: the network.
    :param config: what the model file says of it.
    :param device: where to compute.
    :param options: timesteps or draws to average over, where the kind of network has them.
    :param views: of each radiograph, to average over.
    :param precision: "fp32", or "bf16" or "fp16" (autocast; the latter on a GPU only).
    """

    def __init__(
        self,
        model: th.nn.Module,
        config: SegmentationConfig,
        device: th.device | str = "cpu",
        options: MemberOptions | None = None,
        views: Sequence[View] = (View(),),
        precision: str = "fp32",
    ):
        super().__init__(config)
        self.device = th.device(device)
        check_precision(precision, self.device)
        self.precision = precision
        self.views = tuple(views)
        options = options or MemberOptions()
        timesteps = config.network_timesteps(options.timesteps)
        self.members: list[Member] = config.kind_module().members(
            model.eval(), self.device, dataclasses.replace(options, timesteps=timesteps)
        )
        for member in self.members:
            store_weights(member.network, precision, self.device)

    def start(self, images: Sequence[np.ndarray]) -> list[Finish]:
        reading = self.config.reading
        if not images:
            return []
        if reading.resize == "native":
            return [self._start_native(image) for image in images]
        prepared = normalize(np.stack([reading.prepare(image) for image in images]))
        mean, disagreement = self._average(prepared)
        geometry = reading.geometry()

        def finish(i: int) -> Prediction:
            size = images[i].shape[:2]
            probabilities = geometry.invert_probabilities(mean[i], size)
            if disagreement is None:
                return Prediction(probabilities, entropy_map(probabilities))
            # the first channel becomes 1 where a crop cut pixels off, the second 0
            two = np.stack([np.zeros_like(disagreement[i]), disagreement[i]])
            spread = geometry.invert_probabilities(two, size)[1]
            return Prediction(probabilities, entropy_map(probabilities), spread)

        return [partial(finish, i) for i in range(len(images))]

    def _start_native(self, image: np.ndarray) -> Finish:
        pixels = to_uint8_channels(image, self.config.reading.in_channels)
        mean, disagreement = self._average(normalize(pixels)[None])
        spread = None if disagreement is None else disagreement[0]
        return lambda: Prediction(mean[0], entropy_map(mean[0]), spread)

    @th.inference_mode()
    def _average(self, images: th.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean probabilities `[N x C x H x W]` and disagreement `[N x H x W]` over all members."""
        images, average = images.to(self.device), EnsembleMean()
        for view in self.views:
            for member in self.members:
                scores = self._scores(member.network, view.apply(images))
                found = view.invert(scores.float().softmax(1))
                average.add(found, member.weight, member.by_certainty)
        mean = average.mean().cpu().numpy()
        return mean, average.disagreement().cpu().numpy() if average.count > 1 else None

    def _scores(self, network: Network, images: th.Tensor) -> th.Tensor:
        """Class scores `[N x C x H x W]`; of images at their own size from sliding windows."""
        network = in_precision(network, self.precision, self.device)
        reading = self.config.reading
        if reading.resize == "native":
            return sliding_scores(network, images, reading.geometry().height_width)
        return network(images)


class Ensemble(Segmenter):
    """Several model files that answer as one: the mean of their probabilities.

    :param segmenters: whose classes, channels and intensity rules agree (see `load_predictor`);
        sizes and kinds of network may differ.
    """

    def __init__(self, segmenters: Sequence[Segmenter]):
        super().__init__(segmenters[0].config)
        self.segmenters = tuple(segmenters)

    def start(self, images: Sequence[np.ndarray]) -> list[Finish]:
        started = [segmenter.start(images) for segmenter in self.segmenters]
        return [partial(_mean_prediction, parts) for parts in zip(*started)]


def _mean_prediction(parts: Sequence[Finish]) -> Prediction:
    """The mean of several predictions; their disagreement includes that within each."""
    count = np.float32(len(parts))
    total = entropies = np.zeros((), np.float32)
    for part in parts:  # one after the other: each is large
        prediction = part()
        total = total + prediction.probabilities
        entropies = entropies + prediction.uncertainty
        if prediction.disagreement is not None:
            entropies = entropies - prediction.disagreement
    mean = total / count
    uncertainty = entropy_map(mean)
    return Prediction(mean, uncertainty, (uncertainty - entropies / count).clip(0, 1))


def load_predictor(
    model_path: str,
    device: th.device | str | None = None,
    options: MemberOptions | None = None,
    tta: str = "none",
    flip_swap: str | None = None,
    precision: str = "fp32",
) -> Segmenter:
    """A predictor from a model file that scripts/finetune.py wrote, or from several.

    :param model_path: a file, or several separated by commas, whose probabilities are averaged.
    :param device: by default CUDA where there is one.
    :param options: see `Predictor`.
    :param tta: views to average over, see `views.views_for`.
    :param flip_swap: classes that change places in a mirrored radiograph, such as "1:2"; by
        default as in the fine-tuning.
    :param precision: see `Predictor`.
    :raises UserError: if a file is not a segmentation model, if files disagree about the classes or
        about how radiographs are read, or if an option does not apply to their kind of network.
    """
    paths = [model_path] if os.path.exists(model_path) else model_path.split(",")
    device = device or dist_util.dev()
    predictors: list[Predictor] = []
    for path in filter(None, paths):
        model, config, values = load_model(path)
        views = _views(tta, flip_swap, config, values)
        try:
            predictor = Predictor(model, config, device, options, views, precision)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        predictors.append(predictor)
        check_agreement(paths[0], predictors[0].config, path, config)
    if not predictors:
        raise UserError(f"{model_path!r} names no model file")
    return predictors[0] if len(predictors) == 1 else Ensemble(predictors)


def _views(
    tta: str, flip_swap: str | None, config: SegmentationConfig, values: Mapping[str, Any]
) -> tuple[View, ...]:
    if flip_swap is None and not mirrors(tta):
        return views_for(tta)
    swaps = config.flip_swaps if flip_swap is None else parse_swaps(flip_swap)
    check_swaps(config.categories, swaps or (), chosen=swaps is not None)
    return views_for(tta, swaps or ())


def check_agreement(
    first: str, one: SegmentationConfig, path: str, other: SegmentationConfig
) -> None:
    """Colours and sizes may differ, what a class is and how a file is read may not.

    :param first, path: the names of the two, for messages.
    :raises UserError: if they do.
    """
    remedy = "only models of the same classes can be averaged"
    check_same_classes(one.categories, other.categories, (first, path), remedy)
    for what in ("in_channels", "intensity"):
        ours, their = getattr(one.reading, what), getattr(other.reading, what)
        if ours != their:
            raise UserError(
                f"{first} and {path} read radiographs differently: {what} {ours} and {their}; only "
                "models that read alike can be averaged"
            )
    if one.reading.intensity_rule() != other.reading.intensity_rule():
        raise UserError(
            f"{first} and {path} read radiographs differently: {one.reading.intensity_rule()} and "
            f"{other.reading.intensity_rule()}"
        )
