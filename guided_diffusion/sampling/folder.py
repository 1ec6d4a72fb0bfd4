"""Results folders: the same command finds its folder again, different ones never share one."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import blobfile as bf

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint, packed
from guided_diffusion.runtime.storage.files import expand_path, read_sections

SETTINGS_NAME = "sampling.json"


def results_folder(out_dir: str, model_path: str, *below: str) -> str:
    """Where a command that uses a trained network writes its results.

    `out_dir` if given; else OPENAI_LOGDIR, as in the original package. If that holds a training
    run, its subfolder `below`; if it is not set, that subfolder beside the checkpoint, or of the
    current folder for a checkpoint of the Hub.
    """
    base = expand_path(os.environ.get("OPENAI_LOGDIR", ""))
    if out_dir or (base and not bf.exists(bf.join(base, checkpoint.CONFIG_NAME))):
        return out_dir or base
    if not base and not packed.is_on_hub(model_path):
        base = bf.dirname(model_path.rstrip("/"))
    return bf.join(base or ".", *below)


def samples_folder(
    out_dir: str, model_path: str, name: str, identity: Mapping[str, Any], free: Sequence[str] = ()
) -> str:
    """The folder for samples with these settings: `results_folder` with `samples/NAME` below.

    If that holds samples with other settings, NAME_2 and so on.

    :param identity: the settings that determine the images, as plain values.
    :param free: names of those that the command leaves open, so that they are the folder's.
    :raises UserError: if a folder chosen by the user holds samples with other settings.
    """
    folder = results_folder(out_dir, model_path, "samples", name)
    if folder == results_folder(out_dir, model_path):  # the user's own choice
        if difference := _difference(folder, identity, free):
            raise UserError(
                f"{folder} holds images of another command ({difference}): choose another --out_dir"
            )
        return folder
    more = (f"{folder}_{number}" for number in itertools.count(2))
    return next(f for f in itertools.chain([folder], more) if not _difference(f, identity, free))


def stored_images(folder: str) -> dict[str, Any]:
    """The settings that determine a folder's images; {} if it has none."""
    path = bf.join(folder, SETTINGS_NAME)
    return read_sections(path, "images")["images"] if bf.exists(path) else {}


def _difference(folder: str, identity: Mapping[str, Any], free: Sequence[str]) -> str:
    """How the settings of a folder's images differ from `identity`; "" if they do not."""
    path = bf.join(folder, SETTINGS_NAME)
    if not bf.exists(path):
        images = [bf.join(folder, part) for part in ("png", "IMG", "MASK")]
        filled = any(bf.isdir(part) and list(bf.listdir(part)) for part in images)
        return "of unknown settings" if filled else ""
    there = _unnamed(stored_images(folder))
    here = _unnamed(json.loads(json.dumps(identity)))
    for name in sorted((here.keys() | there.keys()).difference(free)):
        if here.get(name) != there.get(name):
            if name == "checkpoint":
                return "of another checkpoint or configuration"
            return f"{name} {there.get(name)} there, {here.get(name)} here"
    return ""


def _unnamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the names of checkpoints, whose contents count."""
    return {
        key: {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else value
        for key, value in settings.items()
    }
