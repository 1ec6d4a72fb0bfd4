"""Noise becoming a mask, and a mask becoming noise, as pictures."""

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

# moments that the strip shows of each direction
_SHOWN = 8


def write_process(
    model: MaskDiffusionModel,
    images: th.Tensor,
    mask: np.ndarray,
    categories: Sequence[Category],
    stem: str,
) -> None:
    """Write STEM.png, a strip of three rows, and STEM.gif, the same moments one by one.

    The rows: the mask as noise is added; a mask as it is drawn from noise; what the network takes
    that for meanwhile. Classes have their colours, noise mixes them. The first column of each row
    is the radiograph.

    :param images: one radiograph, `[1 x C x H x W]` in [-1, 1].
    :param mask: its class map, uint8 `[H x W]`.
    """
    device = next(model.parameters()).device
    forward = _forward(model, encode(th.from_numpy(mask)[None], len(categories)).to(device))
    backward, guesses = _backward(model, images.to(device))
    shown = to_uint8(images[:1])[0]
    shown = np.broadcast_to(shown, (*shown.shape[:2], 3))
    rows = (forward, backward, guesses)
    cells, captions = [], []
    for name, row in zip(("to noise", "from noise", "its guess"), rows):
        cells += [shown, *(_coloured(state, categories) for _, state in row)]
        captions += [name, *(f"t {timestep}" for timestep, _ in row)]
    write_image(f"{stem}.png", image_grid(np.stack(cells), captions, columns=_SHOWN + 1))
    frames = [
        image_grid(np.stack([shown, _coloured(state, categories)]), ["", f"t {timestep}"])
        for timestep, state in (*forward, *backward)
    ]
    write_gif(f"{stem}.gif", frames)


State = tuple[int, th.Tensor]


def _moments(count: int) -> list[int]:
    """Numbers from 0 to `count` - 1, evenly spread; as many as are shown, some twice if need be."""
    return np.linspace(0, count - 1, _SHOWN).round().astype(int).tolist()


def _forward(model: MaskDiffusionModel, mask: th.Tensor) -> list[State]:
    """A class map `[1 x C x H x W]` at timesteps from first to last, with the same noise."""
    noise = rng.normal(model.seed, "sample", [0], mask.shape[1:]).to(mask.device)
    states = []
    for t in _moments(model.diffusion.num_timesteps):
        times = th.full((1,), t, device=mask.device)
        states.append((_original(model, t), model.diffusion.q_sample(mask, times, noise)))
    return states


def _backward(model: MaskDiffusionModel, images: th.Tensor) -> tuple[list[State], list[State]]:
    """The first mask at moments of its sampling, and the network's prediction of it at each."""
    states, guesses = [], []

    def record(state: dict[str, Any]) -> None:
        timestep = _original(model, state["timestep"])
        states.append((timestep, crop_to(state["sample"], images).clone()))
        guesses.append((timestep, crop_to(state["pred_xstart"], images).clone()))

    model.draw(images, 0, callback=record)
    chosen = _moments(len(states))
    return [states[i] for i in chosen], [guesses[i] for i in chosen]


def _original(model: MaskDiffusionModel, timestep: int) -> int:
    return model.diffusion.timestep_map[timestep]


def _coloured(state: th.Tensor, categories: Sequence[Category]) -> np.ndarray:
    """`[1 x C x H x W]` as uint8 `[H x W x 3]`: the classes' colours, mixed by their shares."""
    colors = np.array([category.color for category in categories], np.float32)
    shares = decode(state)[0].movedim(0, -1).cpu().numpy()
    return np.rint(shares @ colors).astype(np.uint8)
