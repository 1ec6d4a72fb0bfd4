"""Checkpoints of tiny networks with what is beside them, for the tests of sampling."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from conftest import TINY_DIFFUSION
from golden_util import fill_parameters
from PIL import Image

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ClassifierConfig, DiffusionConfig, ModelConfig
from guided_diffusion.runtime.storage import checkpoint

NETWORK = ModelConfig(
    image_size=16,
    in_channels=1,
    num_channels=16,
    num_res_blocks=1,
    num_heads=2,
    channel_mult="1,2",
    attention_resolutions="8",
    learn_sigma=True,
)
CLASSIFIER = ClassifierConfig(
    image_size=16,
    in_channels=1,
    num_classes=2,
    classifier_width=32,
    classifier_depth=1,
    classifier_attention_resolutions="8",
)
DIFFUSION = TINY_DIFFUSION
CLASSES = ("ball", "bar")
# flags of a run of seconds
QUICK = ("--sampler", "dpm++2m", "--steps", "3", "--num_samples", "8")


def write_trained(
    folder: Path,
    model: Any = NETWORK,
    diffusion: DiffusionConfig = DIFFUSION,
    kind: str = "diffusion",
    classes: Sequence[str] = (),
    config: bool = True,
) -> Path:
    """Write the checkpoint of an untrained network, and its config.json where `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ema_0.9_000010.pt"
    network = fill_parameters(dataclasses.replace(model).build())
    th.save(network.state_dict(), path)
    if config:
        sections = {
            "kind": kind,
            "model": model,
            "diffusion": diffusion,
            "reading": ReadingConfig(model.image_size, model.in_channels).to_dict(),
            "classes": list(classes),
        }
        checkpoint.write_config(str(folder), sections)
    return path


def write_shapes(folder: Path, count: int = 8, size: int = 16) -> Path:
    """Write grey pictures of balls and bars, in turn, named by their class."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size - 0.5
    for number in range(count):
        dx, dy = rng.uniform(-0.2, 0.2, 2)
        kind = CLASSES[number % 2]
        inside = np.hypot(x - dx, y - dy) < 0.22 if kind == "ball" else abs(x - dx) < 0.1
        grey = (inside * 200 + 20).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{kind}_{number:03d}.png")
    return folder


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    with np.load(path) as file:
        return dict(file)


def pictures(folder):
    """All PNG files of samples by name."""
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "png").iterdir()}


def same(one, other, tolerance=1):
    """Whether two folders hold the same images, but for a rounding of the last bit."""
    a, b = pictures(one), pictures(other)
    assert a.keys() == b.keys()
    return all(abs(a[name].astype(int) - b[name]).max() <= tolerance for name in a)
