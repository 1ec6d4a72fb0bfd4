"""Joint augmentation of a radiograph and its mask with torchvision's transforms.

Masks are resampled by nearest neighbour and filled with IGNORE outside the image, so augmentation
never introduces a class.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from torchvision import tv_tensors
from torchvision.transforms import v2

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.swaps import Swaps, exchange, parse_swaps
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import Category, check_swaps
from guided_diffusion.segmentation.training.learning import FLIPS, LEVELS

_OUTSIDE = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
_BILINEAR = v2.InterpolationMode.BILINEAR


def check_flips(categories: Sequence[Category], flip: str, flip_swap: str) -> Swaps:
    """The pairs of classes that --flip_swap exchanges.

    :raises UserError: for pairs that are not of these classes, or if images are mirrored left to
        right and classes have a side, but nobody said how to exchange them.
    """
    swaps = parse_swaps(flip_swap)
    chosen = bool(flip_swap) or flip not in ("horizontal", "both")
    check_swaps(categories, swaps, chosen, f"--flip {flip}", "leave out --flip")
    return swaps


class RandomGamma(v2.Transform):
    """Raise grey values to a random power, log-uniform between 1/`largest` and `largest`."""

    def __init__(self, largest: float):
        super().__init__()
        self.largest = largest

    def make_params(self, flat_inputs: list[th.Tensor]) -> dict[str, float]:
        exponent = float(th.empty(()).uniform_(-1, 1))
        return {"gamma": self.largest**exponent}

    def transform(self, inpt: th.Tensor, params: dict[str, float]) -> th.Tensor:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        return self._call_kernel(v2.functional.adjust_gamma, inpt, gamma=params["gamma"])


class _Flip(v2.Transform):
    """Mirror half of the images, exchanging pairs of classes.

    :param horizontal: left to right; otherwise top to bottom.
    """

    def __init__(self, horizontal: bool, swaps: Swaps):
        super().__init__()
        self.mirror = v2.functional.horizontal_flip if horizontal else v2.functional.vertical_flip
        self.swaps = swaps

    def make_params(self, flat_inputs: list[th.Tensor]) -> dict[str, bool]:
        return {"flip": bool(th.rand(()) < 0.5)}

    def transform(self, inpt: th.Tensor, params: dict[str, bool]) -> th.Tensor:
        if not params["flip"]:
            return inpt
        flipped = self.mirror(inpt)
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(th.from_numpy(exchange(flipped.numpy(), self.swaps)))
        return flipped


class Augmentation:
    """Random augmentation of image and mask, reproducible from a seed.

    :param level: "light": small shifts, scaling and brightness; "medium": also rotation, contrast
        and gamma; "heavy": also elastic deformation and crops; "strong": stronger versions of all
        these, with noise, blur and cutout; "none".
    :param flip: "none", "horizontal", "vertical" or "both": directions in which to mirror half of
        the images.
    :param swaps: pairs of classes to exchange in images mirrored left to right.
    :param transforms: torchvision v2 transforms to use instead of those of `level`.
    :raises UserError: for an unknown level or flip.
    """

    def __init__(
        self,
        level: str = "medium",
        flip: str = "none",
        swaps: Swaps = (),
        transforms: Sequence[v2.Transform] | None = None,
    ):
        if level not in LEVELS:
            raise UserError(f"--augmentation {level}: choose one of {', '.join(LEVELS)}")
        if flip not in FLIPS:
            raise UserError(f"--flip {flip}: choose one of {', '.join(FLIPS)}")
        steps = list(_transforms(level) if transforms is None else transforms)
        if flip in ("horizontal", "both"):
            steps.append(_Flip(True, swaps))
        if flip in ("vertical", "both"):
            steps.append(_Flip(False, ()))
        self.transform = v2.Compose(steps) if steps else None

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment an image, uint8 `[H x W x C]`, and its mask, uint8 `[H x W]`; shapes stay."""
        if self.transform is None:
            return image, mask
        with th.random.fork_rng(devices=[]):
            th.manual_seed(seed)
            new_image, new_mask = self.transform(
                tv_tensors.Image(th.tensor(image).movedim(-1, 0).contiguous()),
                tv_tensors.Mask(th.tensor(mask)),
            )
        return new_image.movedim(0, -1).numpy(), new_mask.numpy()


def _transforms(level: str) -> list[v2.Transform]:
    if level == "none":
        return []
    if level == "light":
        return [
            v2.RandomAffine(0, (0.05, 0.05), (0.95, 1.05), None, _BILINEAR, _OUTSIDE),
            v2.ColorJitter(brightness=0.1),
        ]
    geometric = [v2.RandomAffine(10, (0.08, 0.08), (0.85, 1.15), None, _BILINEAR, _OUTSIDE)]
    grey = [v2.ColorJitter(brightness=0.2, contrast=0.3), RandomGamma(1.4)]
    if level == "medium":
        return geometric + grey
    if level == "heavy":
        return [*geometric, _Elastic(0.5), _Zoom(0.6), *grey]
    return [
        v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), None, _BILINEAR, _OUTSIDE),
        _Elastic(0.7),
        _Zoom(0.6),
        *strong_intensity(),
    ]


def strong_intensity() -> list[v2.Transform]:
    """Strong changes of intensity, which leave every pixel in place."""
    return [
        v2.ColorJitter(brightness=0.3, contrast=0.5),
        RandomGamma(2.0),
        v2.RandomApply([_Blur(0.015)], p=0.5),
        v2.RandomApply([_Noise(0.08)], p=0.5),
        v2.RandomApply([_CutOut(0.3)], p=0.5),
    ]


class _Blur(v2.Transform):
    """Gaussian blur of random width.

    :param max_sigma: largest standard deviation, as a fraction of the shorter side.
    """

    def __init__(self, max_sigma: float):
        super().__init__()
        self.max_sigma = max_sigma

    def make_params(self, flat_inputs: list[th.Tensor]) -> dict[str, float]:
        side = min(v2.functional.get_size(flat_inputs[0]))
        return {"sigma": max(0.1, float(th.rand(())) * self.max_sigma * side)}

    def transform(self, inpt: th.Tensor, params: dict[str, float]) -> th.Tensor:
        radius = max(1, round(3 * params["sigma"]))
        if isinstance(inpt, tv_tensors.Mask) or min(inpt.shape[-2:]) <= radius:
            return inpt
        return v2.functional.gaussian_blur(inpt, 2 * radius + 1, params["sigma"])


class _Noise(v2.Transform):
    """Gaussian white noise of random strength.

    :param max_sigma: largest standard deviation, as a fraction of the intensity range.
    """

    def __init__(self, max_sigma: float):
        super().__init__()
        self.max_sigma = max_sigma

    def make_params(self, flat_inputs: list[th.Tensor]) -> dict[str, float]:
        return {"sigma": float(th.rand(())) * self.max_sigma}

    def transform(self, inpt: th.Tensor, params: dict[str, float]) -> th.Tensor:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        noise = 255 * params["sigma"] * th.randn(inpt.shape)
        return tv_tensors.wrap((inpt + noise).round().clamp(0, 255).to(th.uint8), like=inpt)


class _CutOut(v2.Transform):
    """Fill a patch with one grey value (arXiv 1708.04552), leaving the mask as it is.

    :param max_side: longest side of the patch, as a fraction of the image's.
    """

    def __init__(self, max_side: float):
        super().__init__()
        self.max_side = max_side

    def make_params(self, flat_inputs: list[th.Tensor]) -> dict[str, Any]:
        sizes = v2.functional.get_size(flat_inputs[0])
        parts = [max(1, round(float(th.rand(())) * self.max_side * size)) for size in sizes]
        corners = [int(th.randint(size - part + 1, ())) for size, part in zip(sizes, parts)]
        return {
            "rows": slice(corners[0], corners[0] + parts[0]),
            "columns": slice(corners[1], corners[1] + parts[1]),
            "grey": int(th.randint(256, ())),
        }

    def transform(self, inpt: th.Tensor, params: dict[str, Any]) -> th.Tensor:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        painted = inpt.clone()
        painted[..., params["rows"], params["columns"]] = params["grey"]
        return tv_tensors.wrap(painted, like=inpt)


class _Elastic(v2.Transform):
    """Smooth elastic deformation with a standard deviation of 2 % of the shorter side.

    :param p: probability of deforming an image.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def make_params(self, flat_inputs: list[th.Tensor]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        side = min(height, width)
        if float(th.rand(())) >= self.p or side < 12:
            return {"displacement": None}
        # white noise between -1 and 1 blurred by sigma has the standard deviation 0.16 / sigma
        sigma = side / 12
        noise = th.rand(2, 1, height, width) * 2 - 1
        smooth = v2.functional.gaussian_blur(noise, int(8 * sigma) // 2 * 2 + 1, sigma)
        pixels = 0.02 * side * sigma / 0.16 * smooth[:, 0].movedim(0, -1)
        # x and y on axes where the image spans -1 to 1
        return {"displacement": (pixels * 2 / th.tensor([width, height]))[None]}

    def transform(self, inpt: th.Tensor, params: dict[str, Any]) -> th.Tensor:
        if params["displacement"] is None:
            return inpt
        return self._call_kernel(v2.functional.elastic, inpt, **params, fill=_OUTSIDE[type(inpt)])


class _Zoom(v2.Transform):
    """Crop at random and resize to the original size.

    :param min_scale: shortest side of the crop, as a fraction of the image's.
    """

    def __init__(self, min_scale: float):
        super().__init__()
        self.min_scale = min_scale

    def make_params(self, flat_inputs: list[th.Tensor]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        scale = float(th.empty(()).uniform_(self.min_scale, 1))
        part = {"height": max(1, round(height * scale)), "width": max(1, round(width * scale))}
        return {
            "top": int(th.randint(height - part["height"] + 1, ())),
            "left": int(th.randint(width - part["width"] + 1, ())),
            "size": [height, width],
            **part,
        }

    def transform(self, inpt: th.Tensor, params: dict[str, Any]) -> th.Tensor:
        return self._call_kernel(
            v2.functional.resized_crop, inpt, **params, interpolation=_BILINEAR, antialias=True
        )
