"""The methods that label efficiency compares, by name: training scripts with flags, and unions of
their networks, which predict as one."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError
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
# a script, by default finetune.py, and its flags, or the methods of a union; the baselines learn at
# Adam's default rate, whatever the recipe's is, and the pretrained one at the rate that folds have
# chosen
METHODS = {
    "recipe": "",
    "plain": "--loss ce --schedule constant --warmup 0 --lr 1e-3 --weight_decay 0 --ema_rate 0"
    " --layer_decay 1 --head_lr_scale 1 --timestep 1 --noise_at_timestep False"
    " --augmentation light",
    "partner": "recipe + imagenet",  # the networks of finetune.py --partner imagenet
    "scratch": "--random_init True",
    "smp": "baseline_train.py --network smp --encoder resnet34 --encoder_weights none --lr 1e-3",
    "imagenet": "baseline_train.py --network smp --encoder tu-tf_efficientnet_lite0"
    " --encoder_weights imagenet --lr 3e-3",
    "features": "baseline_train.py --network features --lr 1e-3",
    "mask_diffusion": "mask_diffusion_train.py --lr 1e-3 --ema_rate 0.99 --sample_interval 0",
}


@dataclass(frozen=True)
class Method:
    """A script in `scripts/` and its flags; or other methods, whose networks predict as one."""

    name: str
    script: str = ""
    flags: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


def parse_methods(text: str, more: Sequence[str] = ()) -> list[Method]:
    """The methods that `text` names, separated by commas, and after them those of unions.

    :param more: definitions such as "NAME: FLAGS", "NAME: SCRIPT FLAGS" or "NAME: METHOD + METHOD".
    """
    known = dict(METHODS)
    for definition in more:
        name, flags = _definition("--method", definition)
        known[name] = flags
    methods: dict[str, Method] = {}
    names = comma_separated(text)
    for name in names:  # grows by the members of unions
        if name not in known:
            raise UserError(
                f"--methods {name}: choose from {', '.join(known)}, or define it by --method"
            )
        methods[name] = _parse_method(name, known[name])
        names += [member for member in methods[name].members if member not in names]
    for union in methods.values():
        if inner := [name for name in union.members if methods[name].members]:
            raise UserError(
                f"--method {union.name}: {inner[0]} is a union itself: name its methods"
            )
    return list(methods.values())


def _parse_method(name: str, definition: str) -> Method:
    words = split_flags(f"--method {name}", definition)
    if set(words[1::2]) == {"+"}:
        members = words[::2]
        if len(words) % 2 == 0 or len(set(members)) < len(members):
            raise UserError(
                f"--method {name}: {definition.strip()}: expected METHOD + METHOD, no method twice"
            )
        return Method(name, members=tuple(members))
    script = "finetune.py"
    if words and words[0].endswith(".py"):
        script = words.pop(0)
    if script not in RUNNERS:
        raise UserError(f"--method {name}: {script} is not one of {', '.join(RUNNERS)}")
    return Method(name, script, tuple(words))


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
