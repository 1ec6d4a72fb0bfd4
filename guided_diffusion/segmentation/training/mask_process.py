"""Pictures of the diffusion of masks: a mask turning into noise, and noise into a mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th

from guided_diffusion.images.image_io import write_image
from guided_diffusion.runtime import rng
from guided_diffusion.sampling.images import to_uint8
from guided_diffusion.sampling.pictures import image_grid, write_gif
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.networks.mask_diffusion import MaskDiffusionModel, decode, encode
from guided_diffusion.segmentation.networks.padding import crop_to

# timesteps shown per row
_COLUMNS = 8


def write_process(
    model: MaskDiffusionModel,
    images: th.Tensor,
    mask: np.ndarray,
    categories: Sequence[Category],
    stem: str,
) -> None:
    """Write STEM.png, a grid of three rows, and STEM.gif, an animation of the first two.

    The rows: the mask as noise is added; a mask as it is sampled from noise; the network's
    prediction of that mask at each timestep. Classes are shown in their colours, which noise
    blends. Each row starts with the radiograph.

    :param images: the radiograph, `[1 x C x H x W]` in [-1, 1].
    :param mask: its class map, uint8 `[H x W]`.
    """
    device = next(model.parameters()).device
    forward = _forward(model, encode(th.from_numpy(mask)[None], len(categories)).to(device))
    backward, predictions = _backward(model, images.to(device))
    shown = to_uint8(images[:1])[0]
    shown = np.broadcast_to(shown, (*shown.shape[:2], 3))
    rows = (forward, backward, predictions)
    cells, captions = [], []
    for name, row in zip(("to noise", "from noise", "predicted"), rows):
        cells += [shown, *(_coloured(state, categories) for _, state in row)]
        captions += [name, *(f"t {timestep}" for timestep, _ in row)]
    write_image(f"{stem}.png", image_grid(np.stack(cells), captions, columns=_COLUMNS + 1))
    frames = [
        image_grid(np.stack([shown, _coloured(state, categories)]), ["", f"t {timestep}"])
        for timestep, state in (*forward, *backward)
    ]
    write_gif(f"{stem}.gif", frames)


State = tuple[int, th.Tensor]


def _shown_indices(count: int) -> list[int]:
    """The indices to show of `count`, evenly spaced; some repeat if there are too few."""
    return np.linspace(0, count - 1, _COLUMNS).round().astype(int).tolist()


def _forward(model: MaskDiffusionModel, mask: th.Tensor) -> list[State]:
    """An encoded mask `[1 x C x H x W]` from first to last timestep, with the same noise."""
    noise = rng.normal(model.seed, "sample", [0], mask.shape[1:]).to(mask.device)
    states = []
    for t in _shown_indices(model.diffusion.num_timesteps):
        times = th.full((1,), t, device=mask.device)
        states.append((_full_timestep(model, t), model.diffusion.q_sample(mask, times, noise)))
    return states


def _backward(model: MaskDiffusionModel, images: th.Tensor) -> tuple[list[State], list[State]]:
    """A mask while it is sampled, and the network's prediction of it at each timestep."""
    states, predictions = [], []

    def record(state: dict[str, Any]) -> None:
        timestep = _full_timestep(model, state["timestep"])
        states.append((timestep, crop_to(state["sample"], images).clone()))
        predictions.append((timestep, crop_to(state["pred_xstart"], images).clone()))

    model.draw(images, 0, callback=record)
    shown = _shown_indices(len(states))
    return [states[i] for i in shown], [predictions[i] for i in shown]


def _full_timestep(model: MaskDiffusionModel, timestep: int) -> int:
    """A timestep of the respaced process as one of the full process."""
    return model.diffusion.timestep_map[timestep]


def _coloured(state: th.Tensor, categories: Sequence[Category]) -> np.ndarray:
    """An encoded mask `[1 x C x H x W]` as uint8 RGB `[H x W x 3]`, blending class colours."""
    colors = np.array([category.color for category in categories], np.float32)
    shares = decode(state)[0].movedim(0, -1).cpu().numpy()
    return np.rint(shares @ colors).astype(np.uint8)
