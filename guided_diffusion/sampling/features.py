"""Feature extractors for comparing sets of images."""

import urllib.error
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch as th
import torch.nn.functional as F

from guided_diffusion.images.reading import normalize
from guided_diffusion.networks.precision import in_precision
from guided_diffusion.networks.process import network_timestep
from guided_diffusion.networks.trained import Trained
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.storage import checkpoint

# torchvision's name, input size in pixels and weights of each network
TORCHVISION = {
    "inception": ("inception_v3", 299, "IMAGENET1K_V1"),
    "resnet18": ("resnet18", 224, "IMAGENET1K_V1"),
    "resnet50": ("resnet50", 224, "IMAGENET1K_V2"),
}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Extractor:
    """Maps images to feature vectors.

    name: description of the features. extract: maps float `[N x C x H x W]` in [-1, 1] to
    `[N x D]`.
    """

    name: str
    extract: Callable[[th.Tensor], th.Tensor]

    def in_precision(self, precision: str, device: th.device) -> "Extractor":
        """The same features, computed in a precision; the name says it unless it is fp32."""
        if precision == "fp32":
            return self
        extract = in_precision(self.extract, precision, device)
        return Extractor(f"{self.name}; computed in {precision}", extract)

    def __call__(self, images: np.ndarray, batch_size: int, device: th.device) -> np.ndarray:
        """Features, float32 `[N x D]`, of uint8 images `[N x H x W x C]`."""
        found = []
        with th.inference_mode(), progress_bar(len(images), "image", desc="features") as bar:
            for first in range(0, len(images), batch_size):
                batch = normalize(images[first : first + batch_size]).to(device)
                found.append(self.extract(batch).float().cpu().numpy())
                bar.update(len(batch))
        return np.concatenate(found)


def torchvision_features(name: str, weights: str, device: th.device | str) -> Extractor:
    """Penultimate-layer features of an ImageNet classifier.

    :param name: inception, resnet18 or resnet50.
    :param weights: file with its state_dict; "" downloads torchvision's.
    :raises UserError: if the weights cannot be downloaded or belong to another network.
    """
    import torchvision.models  # takes seconds to import

    builder, side, release = TORCHVISION[name]
    if weights:
        state = checkpoint.load(weights)
    else:
        release = torchvision.models.get_model_weights(builder)[release]
        try:
            state = release.get_state_dict(progress=True, check_hash=True)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"the weights of {builder} cannot be fetched from {release.url} ({error}): download"
                " that file elsewhere and name it with --weights, or use --features ddpm"
            ) from error
    special = {"transform_input": True, "init_weights": False} if name == "inception" else {}
    network = getattr(torchvision.models, builder)(weights=None, **special)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--weights {weights} is no state_dict of {builder}") from error
    network.fc = th.nn.Identity()
    network.to(device).eval()
    mean = th.tensor(_IMAGENET_MEAN, device=device)[:, None, None]
    deviation = th.tensor(_IMAGENET_DEVIATION, device=device)[:, None, None]

    def extract(images: th.Tensor) -> th.Tensor:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        images = F.interpolate(
            (images + 1) / 2, (side, side), mode="bilinear", antialias=True, align_corners=False
        )
        return network((images - mean) / deviation)

    return Extractor(
        f"torchvision's {builder}, ImageNet, last layer but one; not the network of published FIDs",
        extract,
    )


def ddpm_features(trained: Trained, share: float, device: th.device | str) -> Extractor:
    """Features from the middle block of a diffusion network, averaged over positions.

    Images are fed in without added noise, at a small timestep.

    :param share: the timestep as a fraction of the process, in [0, 1].
    :raises UserError: if the network always needs a class.
    """
    network = trained.network(device)
    if trained.model.class_cond and not trained.model.cond_drop_prob:
        raise UserError(
            f"{trained.path} is class-conditional and cannot run without a class: for features, use"
            " an unconditional network or one trained with --cond_drop_prob"
        )
    steps = trained.diffusion.diffusion_steps
    timestep = round(share * (steps - 1))
    seen: list[th.Tensor] = []
    network.get_submodule("middle_block").register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    entry = network_timestep(timestep, trained.diffusion)

    def extract(images: th.Tensor) -> th.Tensor:
        times = th.full((len(images),), entry, device=images.device)
        classes = {}
        if trained.model.class_cond:
            null = trained.model.num_classes
            classes["y"] = th.full((len(images),), null, device=images.device)
        network(images, times, **classes)
        return seen.pop().float().mean(dim=(2, 3))

    return Extractor(
        f"middle block of the diffusion network {trained.path} at timestep {timestep} of {steps};"
        " comparable only among evaluations with this file",
        extract,
    )
