"""The folder of sampled images: found again by the same command, never mixed with another's."""

import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import blobfile as bf

from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import read_json

SETTINGS_NAME = "sampling.json"


def results_folder(out_dir: str, model_path: str, *below: str) -> str:
    """Where the results of a command go that uses a trained network.

    `out_dir` where it is given; else OPENAI_LOGDIR itself, as in the original package, unless a
    training run lives there: then a folder in it, named by `below`, so that the run is not
    disturbed; where OPENAI_LOGDIR is not set, that folder beside the checkpoint.
    """
    base = os.path.expanduser(os.environ.get("OPENAI_LOGDIR", ""))
    if out_dir or (base and not bf.exists(bf.join(base, checkpoint.CONFIG_NAME))):
        return out_dir or base
    return bf.join(base or bf.dirname(model_path) or ".", *below)


def samples_folder(out_dir: str, model_path: str, name: str, identity: Mapping[str, Any]) -> str:
    """The folder of sampled images of this identity: `results_folder` with `samples/NAME` below.

    Commands that differ in what the name does not tell have several such folders: NAME_2, ...

    :raises UserError: if images of another identity are in a folder that the user named.
    """
    folder = results_folder(out_dir, model_path, "samples", name)
    if folder == results_folder(out_dir, model_path):  # the user's own choice
        if difference := _difference(folder, identity):
            raise UserError(
                f"{folder} holds images of another command ({difference}): choose another --out_dir"
            )
        return folder
    more = (f"{folder}_{number}" for number in itertools.count(2))
    return next(f for f in itertools.chain([folder], more) if not _difference(f, identity))


def _difference(folder: str, identity: Mapping[str, Any]) -> str:
    """In what the images in a folder differ from those of the identity; "": in nothing."""
    path = bf.join(folder, SETTINGS_NAME)
    if not bf.exists(path):
        images = [bf.join(folder, part) for part in ("png", "IMG", "MASK")]
        filled = any(bf.isdir(part) and list(bf.listdir(part)) for part in images)
        return "of unknown settings" if filled else ""
    there, here = read_json(path)["images"], json.loads(json.dumps(identity))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            if name == "checkpoint":
                return "of another checkpoint or configuration"
            return f"{name} {there.get(name)} there, {here.get(name)} here"
    return ""
