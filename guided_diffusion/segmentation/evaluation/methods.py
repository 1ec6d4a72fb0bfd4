"""The methods that label efficiency compares: training scripts with flags, by name."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.training.config import (
    baseline_flags,
    finetune_flags,
    mask_diffusion_flags,
)

# each script that a method may run, its parser, and the module whose `prepare` does the same in
# this process
RUNNERS = {
    "finetune.py": (finetune_flags, "guided_diffusion.segmentation.training.finetune"),
    "baseline_train.py": (baseline_flags, "guided_diffusion.segmentation.training.baselines"),
    "mask_diffusion_train.py": (
        mask_diffusion_flags,
        "guided_diffusion.segmentation.training.mask_training",
    ),
}
# a script, by default finetune.py, and its flags; the baselines learn at Adam's default rate,
# whatever the recipe's is, and the pretrained one at the rate that folds have chosen
METHODS = {
    "recipe": "",
    "plain": "--loss ce --schedule constant --warmup 0 --lr 1e-3 --weight_decay 0 --ema_rate 0"
    " --layer_decay 1 --head_lr_scale 1 --timestep 1 --noise_at_timestep False"
    " --augmentation light",
    "partner": "--partner imagenet",
    "scratch": "--random_init True",
    "smp": "baseline_train.py --network smp --encoder resnet34 --encoder_weights none --lr 1e-3",
    "imagenet": "baseline_train.py --network smp --encoder tu-tf_efficientnet_lite0"
    " --encoder_weights imagenet --lr 3e-3",
    "features": "baseline_train.py --network features --lr 1e-3",
    "mask_diffusion": "mask_diffusion_train.py --lr 1e-3 --ema_rate 0.99 --sample_interval 0",
}


@dataclass(frozen=True)
class Method:
    """A script in `scripts/` and its flags."""

    name: str
    script: str
    flags: tuple[str, ...]


def parse_methods(text: str, more: Sequence[str] = ()) -> list[Method]:
    """The methods that `text` names, separated by commas.

    :param more: definitions such as "NAME: FLAGS" or "NAME: SCRIPT FLAGS".
    """
    known = dict(METHODS)
    for definition in more:
        name, flags = _definition("--method", definition)
        known[name] = flags
    methods = []
    for name in comma_separated(text):
        if name not in known:
            raise UserError(
                f"--methods {name}: choose from {', '.join(known)}, or define it by --method"
            )
        words = split_flags(f"--method {name}", known[name])
        script = "finetune.py"
        if words and words[0].endswith(".py"):
            script = words.pop(0)
        if script not in RUNNERS:
            raise UserError(f"--method {name}: {script} is not one of {', '.join(RUNNERS)}")
        methods.append(Method(name, script, tuple(words)))
    return methods


def parse_variants(definitions: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Flags of evaluate.py by name, from definitions such as "NAME: FLAGS"."""
    found = {}
    for definition in definitions:
        name, flags = _definition("--variant", definition)
        found[name] = tuple(split_flags(f"--variant {name}", flags))
        from_flags(AveragingConfig, parse_flags(make_parser("", AveragingConfig), found[name]))
    return found


def split_flags(source: str, text: str) -> list[str]:
    """Flags as a shell splits them.

    :param source: the flag that gave the text, for messages.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{source}: {text!r} is no list of flags: {error}") from error


def _definition(flag_name: str, text: str) -> tuple[str, str]:
    name, colon, flags = text.partition(":")
    if not colon or not re.fullmatch(r"[\w.+-]+", name.strip()):
        raise UserError(f"{flag_name} {text!r}: expected 'NAME: FLAGS', without / or spaces")
    return name.strip(), flags


def comma_separated(text: str) -> list[str]:
    """The words of a comma-separated list, without empty ones."""
    return [word.strip() for word in text.split(",") if word.strip()]
