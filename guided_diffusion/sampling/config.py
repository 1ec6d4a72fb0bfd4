"""The flags of sampling, and of measuring what was sampled."""

import dataclasses
from typing import Any, TypeVar

from guided_diffusion.runtime.command_line.flags import (
    MOST_BATCH,
    MOST_SEED,
    Overrides,
    flag,
    from_flags,
)
from guided_diffusion.runtime.command_line.precision_flag import precision_flag


@dataclasses.dataclass(frozen=True)
class SamplerTraits:
    """What a sampler of `solvers.SAMPLERS` can do.

    :param few_steps: designed for few steps rather than all timesteps.
    :param takes_eta: whether it uses `SamplerOptions.eta`.
    """

    few_steps: bool = False
    takes_eta: bool = False


TRAITS = {
    "ddpm": SamplerTraits(),
    "ddim": SamplerTraits(takes_eta=True),
    "dpm++2m": SamplerTraits(few_steps=True, takes_eta=True),
    "heun": SamplerTraits(few_steps=True),
    "unipc": SamplerTraits(few_steps=True),
}
WITH_ETA = [name for name, traits in TRAITS.items() if traits.takes_eta]
# default step count of the fast samplers
DEFAULT_STEPS = 20
_FEW = [name for name, traits in TRAITS.items() if traits.few_steps]
_ALL = [name for name in TRAITS if name not in _FEW]
# networks that see the images when samples are compared, see `features.py`
FEATURES = ("inception", "resnet18", "resnet50", "ddpm")
# what an output is called in every command
_OUTPUT = ("-o", "--output")

# what flags that are left open are: the original's 10000 images at every timestep take days
OPEN_NUM_SAMPLES = 16
OPEN_SAMPLER: dict[str, Any] = {"sampler": "dpm++2m", "eta": 1.0}
_CHOOSING = ("sampler", "use_ddim", "steps", "timestep_respacing", "eta")
MOST_SAMPLES = 10**7


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sampling."""

    TITLE = "Sampling"
    SECTION = "sample"

    model_path: str = flag(
        "",
        "checkpoint, ema_*.pt or model*.pt; config.json beside it is read",
        "--checkpoint",
        basic=True,
    )
    num_samples: int = flag(
        10000,
        "number of images to sample",
        least=1,
        most=MOST_SAMPLES,
        basic=True,
        default_words=f"{OPEN_NUM_SAMPLES}; one of each mask or small image",
    )
    batch_size: int = flag(16, "images per batch and rank", least=1, most=MOST_BATCH, basic=True)
    seed: int = flag(
        0,
        "seed of noise and random classes; image k depends on it and on k",
        least=0,
        most=MOST_SEED,
        basic=True,
    )
    sampler: str = flag(
        "",
        "how to sample",
        choices=("", *TRAITS),
        basic=True,
        default_words=f"{OPEN_SAMPLER['sampler']} with --eta {OPEN_SAMPLER['eta']:g}; ddim with"
        " --use_ddim; ddpm with --steps, --eta or --timestep_respacing",
    )
    steps: int = flag(
        0,
        f"timesteps to sample at; 0: {DEFAULT_STEPS} for {', '.join(_FEW)}; all for"
        f" {', '.join(_ALL)}",
        least=0,
        most=10**5,
        basic=True,
    )
    eta: float = flag(
        0.0,
        f"noise added by {' and '.join(WITH_ETA)}: 0 none, 1 as much as ddpm, which corrects errors"
        " of the network",
        least=0,
        most=1,
    )
    use_ddim: bool = flag(False, "same as --sampler ddim")
    clip_denoised: bool = flag(True, "clip every predicted image to the range of pixel values")
    class_labels: str = flag(
        "", "class names or numbers, comma-separated, used in turn; '': random classes", basic=True
    )
    guidance_scale: float = flag(
        1.0,
        "classifier-free guidance scale; 1 disables it; needs a network trained with"
        " --cond_drop_prob or --use_ablated_segmentations",
        least=-1000,
        most=1000,
        basic=True,
    )
    save_process: bool = flag(False, "also show the sampling process: process.png and process.gif")
    precision: str = precision_flag()
    compile: bool = flag(
        False, "compile the network, on GPUs to a CUDA graph: takes minutes, then runs faster"
    )
    out_dir: str = flag(
        "", "folder for the results; '': see docs/sampling.md", *_OUTPUT, basic=True
    )


@dataclasses.dataclass(frozen=True)
class GuidedSampleConfig(SampleConfig):
    """Sampling."""

    seg_dir: str = flag("", "class maps: an image is sampled for each, under its name", basic=True)
    seg_split: str = flag(
        "test", "which of SEG_DIR/all/{train,val,test}, where that is the layout", metavar="NAME"
    )
    samples_per_mask: int = flag(1, "images for each class map", least=1, most=10**6, basic=True)
    ignore_index: int = flag(
        -1,
        "value of class map pixels without a label, which count as background; -1: none",
        least=-1,
        most=2**16 - 1,
    )
    ablate_classes: str = flag(
        "", "classes to leave unspecified, comma-separated indices, e.g. 1,3"
    )


@dataclasses.dataclass(frozen=True)
class ClassifierSampleConfig(SampleConfig):
    """Sampling."""

    classifier_path: str = flag("", "checkpoint of the classifier", basic=True)
    classifier_scale: float = flag(
        1.0, "strength of the classifier's guidance; 0: none", least=-1000, most=1000, basic=True
    )


@dataclasses.dataclass(frozen=True)
class SuperResSampleConfig(SampleConfig):
    """Sampling; image k sharpens small image k modulo their number."""

    base_samples: str = flag(
        "", "small images: .npz of a sampling script, folder or glob", metavar="PATH", basic=True
    )


Sample = TypeVar("Sample", bound=SampleConfig)


def sample_settings(config: type[Sample], overrides: Overrides, count: int = 0) -> Sample:
    """The settings of a sampling command, with few images and steps where the flags say nothing.

    :param count: images to sample unless --num_samples says it; by default OPEN_NUM_SAMPLES.
    """
    left_open: dict[str, Any] = {}
    if "num_samples" not in overrides:
        left_open["num_samples"] = count or OPEN_NUM_SAMPLES
    if not any(name in overrides for name in _CHOOSING):
        left_open |= OPEN_SAMPLER
    return from_flags(config, {**left_open, **overrides})


def said_of_defaults(overrides: Overrides) -> str:
    """What to tell a user who left open how many images are sampled how; "" if the flags say it."""
    opened = {}
    if "num_samples" not in overrides:
        opened["the number of images"] = f"--num_samples {SampleConfig.num_samples}"
    if not any(name in overrides for name in _CHOOSING):
        opened["the sampler"] = "--sampler ddpm"
    if not opened:
        return ""
    original = " ".join(opened.values())
    return f"{' and '.join(opened)} by default; as in the original package: {original}"


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
    """Likelihood."""

    TITLE = "Likelihood"

    data_dir: str = flag("", "folder of the images, searched recursively; or a glob", basic=True)
    model_path: str = flag(
        "",
        "checkpoint, ema_*.pt or model*.pt; config.json beside it is read",
        "--checkpoint",
        basic=True,
    )
    num_samples: int = flag(
        1000, "images to measure, at most: the first by name", least=1, basic=True
    )
    batch_size: int = flag(
        1, "images that a rank measures at once", least=1, most=MOST_BATCH, basic=True
    )
    clip_denoised: bool = flag(True, "clip every predicted image to the range of pixels")
    seed: int = flag(0, "of the noise", least=0, most=MOST_SEED)
    precision: str = precision_flag("fp32")
    out_dir: str = flag("", "folder of the results; '': see docs/sampling.md", *_OUTPUT, basic=True)


@dataclasses.dataclass(frozen=True)
class EvaluateSamplesConfig:
    """Comparison."""

    TITLE = "Comparison"

    features: str = flag("inception", "network that sees the images", choices=FEATURES, basic=True)
    weights: str = flag(
        "", "file of its weights; '': torchvision downloads them", metavar="FILE", basic=True
    )
    model_path: str = flag(
        "",
        "pretrained checkpoint, for --features ddpm; needs no download",
        "--checkpoint",
        basic=True,
    )
    feature_timestep: float = flag(
        0.05, "for ddpm: timestep of the images, as a share of all", least=0, most=1
    )
    nearest_k: int = flag(
        5, "neighbours that span the balls of precision, recall and coverage", least=1, basic=True
    )
    batch_size: int = flag(32, "images per forward pass", least=1, most=MOST_BATCH)
    precision: str = precision_flag("fp32")
    out_dir: str = flag(
        "",
        "folder of the results; '': evaluation_FEATURES beside the samples",
        *_OUTPUT,
        basic=True,
    )
