"""Runs in `runs/<date>-<time>`, whose folder nobody named: how to resume them."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from guided_diffusion import dist_util
from guided_diffusion.networks.record import NetworkRecord
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.runtime.storage.contents import changes
from guided_diffusion.training.history import changed_settings

# what `run_folder` names a folder by
DATED = "%Y%m%d-%H%M%S"
_DATED = re.compile(r"\d{8}-\d{6}")


class Unfinished(NamedTuple):
    """A run with steps left to do: its folder, and the steps that are done."""

    folder: str
    step: int


def notes_on(folder: str, record: NetworkRecord, kind: str, config: Mapping[str, Any]) -> list[str]:
    """Lines for the log of a new run in a folder that nobody named.

    :param kind: of the network.
    :param config: of `training_sections`.
    """
    notes = [f"no run folder was named: the same command again begins anew; {_how(folder)}"]
    found = find_unfinished(folder, record, kind, config)
    if found is not None:
        notes.append(
            f"{found.folder} holds an unfinished run of the same configuration and images, at step"
            f" {found.step}: if it does not run any more, stop this one; {_how(found.folder)}"
        )
    return notes


def _how(folder: str) -> str:
    """What resumes the run in a folder, in words."""
    flag = f"--output {shlex.quote(folder)}"
    if dist_util.world_size() > 1:
        return f"to resume, give the same command with {flag}"
    return f"to resume: python {shlex.join(sys.argv)} {flag}"


def find_unfinished(
    folder: str, record: NetworkRecord, kind: str, config: Mapping[str, Any]
) -> Unfinished | None:
    """The newest dated run beside a folder that is the same as the one in it, if steps are left."""
    beside, own = os.path.split(folder)
    names = os.listdir(beside or ".") if os.path.isdir(beside or ".") else []
    for name in sorted(filter(_DATED.fullmatch, names), reverse=True):
        path = os.path.join(beside, name)
        if name == own or not (steps := checkpoint.complete_steps(path)):
            continue
        try:
            stored = checkpoint.read_config(path)
        except UserError:
            continue
        if stored is not None and _is_same(record.sections(kind), config, stored):
            flags = config["training"]
            limit = flags["max_steps"] or flags["lr_anneal_steps"]
            return Unfinished(path, steps[-1]) if not limit or steps[-1] < limit else None
    return None


def _is_same(
    sections: Mapping[str, Any], config: Mapping[str, Any], stored: Mapping[str, Any]
) -> bool:
    """Whether two runs learn the same from the same images."""
    for name, value in sections.items():
        now = vars(value) if hasattr(value, "__dataclass_fields__") else value
        before = stored.get(name)
        if isinstance(now, dict) and (not isinstance(before, dict) or now.keys() - before.keys()):
            return False
        if changes(name, before, now):
            return False
    data, known = config["data"], stored.get("data", {})
    if any(data[part] != known.get(part) for part in ("contents", "files")):
        return False
    same_start = config["began"].get("contents") == stored.get("began", {}).get("contents")
    return same_start and not changed_settings(stored.get("training", {}), config["training"])
