"""Segmentation models and a radiograph to class probabilities at the radiograph's size."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.reading import normalize, to_uint8_channels
from guided_diffusion.networks.compiled import compiled
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import Category, check_swaps
from guided_diffusion.segmentation.inference.uncertainty import Members, entropy_map
from guided_diffusion.segmentation.inference.views import View, views_for
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model
from guided_diffusion.segmentation.networks.windows import sliding_scores
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.stepper import PRECISIONS
from guided_diffusion.unet import SegmentationUNetModel


class Predictor:
    """Segments radiographs as the model file says they must be read.

    :param model: the network, in eval mode.
    :param config: what the model file says of it.
    :param device: where to compute.
    :param timesteps: at which radiographs enter, in the network's units, to average over; by
        default the model's own. For networks of kind "unet".
    :param views: of each radiograph, to average over.
    :param precision: "fp32", or "bf16" or "fp16" (autocast; the latter on a GPU only).
    :param compile: compile the network, see `compiled.compiled`.
    """

    def __init__(
        self,
        model: th.nn.Module,
        config: SegmentationConfig,
        device: th.device | str = "cpu",
        timesteps: Sequence[float] = (),
        views: Sequence[View] = (View(),),
        precision: str = "fp32",
        compile: bool = False,
    ):
        self.config = config
        self.device = th.device(device)
        if timesteps and config.kind != "unet":
            raise UserError(
                f"--timesteps is for networks of kind unet; this one is of kind {config.kind}"
            )
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("--precision fp16 needs a GPU: take bf16 or fp32")
        if isinstance(model, SegmentationUNetModel) and len(timesteps) < 2:
            model, timesteps = model.folded(*timesteps), ()
        self.model = model.to(device).eval()
        self.network = self.model
        if compile and config.kind == "mask_diffusion":  # draws by many calls of its network
            self.model.network.compile()
        elif compile:
            self.network = compiled(self.model)
        self.timesteps = tuple(timesteps)
        self.views = tuple(views)
        self.precision = precision

    @property
    def categories(self) -> tuple[Category, ...]:
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

    def segment_with_uncertainty(
        self, images: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `segment`, each with its uncertainty: float32 `[H x W]` in [0, 1]."""
        found = [finish() for finish in self.start(images)]
        return [(prediction.probabilities, prediction.uncertainty) for prediction in found]

    def start(self, images: Sequence[np.ndarray]) -> list[Callable[[], Prediction]]:
        """The network's part of the work, for all images at once.

        :return: for each image a function that does the rest, which any thread may call: results
            at full size are large, and need not exist all at the same time.
        """
        reading = self.config.reading
        if not images:
            return []
        if reading.resize == "native":
            return [self._start_native(image) for image in images]
        prepared = normalize(np.stack([reading.prepare(image) for image in images]))
        mean, disagreement = self._members(prepared)
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

        return [lambda i=i: finish(i) for i in range(len(images))]

    def _start_native(self, image: np.ndarray) -> Callable[[], Prediction]:
        whole = to_uint8_channels(image, self.config.reading.in_channels)
        mean, disagreement = self._members(normalize(whole)[None])
        spread = None if disagreement is None else disagreement[0]
        return lambda: Prediction(mean[0], entropy_map(mean[0]), spread)

    @th.inference_mode()
    def _members(self, images: th.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean probabilities `[N x C x H x W]` and disagreement `[N x H x W]` of all members."""
        images, members = images.to(self.device), Members()
        for view in self.views:
            for timestep in self.timesteps or (None,):
                for scores in self._scores(view.apply(images), timestep):
                    members.add(view.invert(scores.float().softmax(1)))
        mean = members.mean().cpu().numpy()
        return mean, members.disagreement().cpu().numpy() if members.count > 1 else None

    def _scores(self, images: th.Tensor, timestep: float | None) -> th.Tensor:
        """Class scores `[S x N x C x H x W]` of S draws; 1 of a network that draws nothing."""

        def network(x: th.Tensor) -> th.Tensor:  # draws and classes in one axis, for windows
            with th.autocast(self.device.type, PRECISIONS[self.precision], self._half):
                if hasattr(self.model, "draws"):
                    draws = self.model.draws(x).float().clamp_min(1e-12).log()
                    return draws.transpose(0, 1).flatten(1, 2)
                if timestep is None:
                    return self.network(x)
                return self.network(x, th.full((len(x),), float(timestep), device=x.device))

        reading = self.config.reading
        if reading.resize == "native":
            scores = sliding_scores(network, images, reading.geometry().height_width)
        else:
            scores = network(images)
        return scores.unflatten(1, (-1, len(self.categories))).transpose(0, 1)

    @property
    def _half(self) -> bool:
        return self.precision != "fp32"


class Ensemble(Predictor):
    """Several checkpoints that answer as one: the mean of their probabilities.

    :param predictors: whose classes, channels and intensity rules agree (see `load_predictor`);
        sizes and kinds of network may differ.
    """

    def __init__(self, predictors: Sequence[Predictor]):
        self.predictors = tuple(predictors)
        self.config = predictors[0].config

    def start(self, images: Sequence[np.ndarray]) -> list[Callable[[], Prediction]]:
        started = [predictor.start(images) for predictor in self.predictors]

        def finish(parts: Sequence[Callable[[], Prediction]]) -> Prediction:
            total, own = 0.0, 0.0
            for part in parts:
                prediction = part()
                total = total + prediction.probabilities
                own = own + prediction.uncertainty
                if prediction.disagreement is not None:
                    own = own - prediction.disagreement
            mean = total / np.float32(len(parts))
            uncertainty = entropy_map(mean)
            spread = (uncertainty - own / np.float32(len(parts))).clip(0, 1)
            return Prediction(mean, uncertainty, spread)

        return [lambda parts=parts: finish(parts) for parts in zip(*started)]


def load_predictor(
    model_path: str,
    device: th.device | str | None = None,
    timesteps: Sequence[float] = (),
    tta: str = "none",
    flip_swap: str | None = None,
    precision: str = "fp32",
    drawing: dict[str, Any] | None = None,
    compile: bool = False,
) -> Predictor:
    """A predictor from a model file that scripts/finetune.py wrote, or from several.

    :param model_path: a file, or several separated by commas, whose probabilities are averaged.
    :param device: by default CUDA where there is one.
    :param timesteps: see `Predictor`.
    :param tta: views to average over, see `views.views_for`.
    :param flip_swap: classes that change places in a mirrored radiograph, such as "1:2"; by
        default as in the fine-tuning.
    :param precision: see `Predictor`.
    :param drawing: attributes to set on a network that draws masks: num_samples, steps, sampler,
        seed.
    :param compile: see `Predictor`.
    :raises UserError: if a file is no segmentation model, if files disagree about the classes or
        about how radiographs are read, or if a setting is of no use to them.
    """
    paths = [model_path] if os.path.exists(model_path) else model_path.split(",")
    device = device or dist_util.dev()
    predictors = []
    for path in filter(None, paths):
        model, config, values = load_model(path)
        if drawing:
            _set_drawing(model, drawing, path, config.kind)
        views = _views(tta, flip_swap, config, values.get("origin") or {})
        predictors.append(Predictor(model, config, device, timesteps, views, precision, compile))
        _check_agreement(paths[0], predictors[0].config, path, config)
    if not predictors:
        raise UserError(f"{model_path!r} names no model file")
    return predictors[0] if len(predictors) == 1 else Ensemble(predictors)


def _views(
    tta: str, flip_swap: str | None, config: SegmentationConfig, origin: dict[str, Any]
) -> tuple[View, ...]:
    if tta not in ("flips", "all"):
        return views_for(tta)
    from guided_diffusion.segmentation.categories import parse_swaps

    text = flip_swap if flip_swap is not None else str(origin.get("flip_swap", ""))
    known = flip_swap is not None or bool(text) or origin.get("flip") in ("horizontal", "both")
    swaps = parse_swaps(text)
    check_swaps(config.categories, swaps, known)
    return views_for(tta, swaps)


def _set_drawing(model: th.nn.Module, drawing: dict[str, Any], path: str, kind: str) -> None:
    if not hasattr(model, "draws"):
        names = ", ".join(f"--{name}" for name in drawing)
        raise UserError(
            f"{path} is of kind {kind} and draws no masks: leave out {names}, which is for kind "
            "mask_diffusion"
        )
    for name, value in drawing.items():
        setattr(model, name, value)


def _check_agreement(
    first: str, one: SegmentationConfig, path: str, other: SegmentationConfig
) -> None:
    """Colours and sizes may differ, what a class is and how a file is read may not."""
    names, theirs = ([c.name for c in config.categories] for config in (one, other))
    if len(names) != len(theirs):
        raise UserError(
            f"{first} has {len(names)} classes and {path} {len(theirs)}: only models of the same "
            "classes can be averaged"
        )
    for index, (name, their) in enumerate(zip(names, theirs)):
        if name != their:
            raise UserError(
                f"class {index} is {name!r} in {first} and {their!r} in {path}: only models of the "
                "same classes can be averaged"
            )
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
