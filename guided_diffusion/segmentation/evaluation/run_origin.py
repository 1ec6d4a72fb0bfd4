"""What the figures of a comparison were made from: they are never shown as those of other data."""

import os
from collections.abc import Mapping
from typing import Any, TypedDict

from guided_diffusion.images.files import pair_files
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import packed
from guided_diffusion.runtime.storage.contents import (
    Files,
    changed_files,
    changes,
    combined,
    digest,
    digests,
)
from guided_diffusion.segmentation.evaluation.draws import find_files

# arguments of the training scripts that say nothing more than the contents and the folder do
_ELSEWHERE = ("train_img", "train_mask", "train_names", "weights_save")


class RunOrigin(TypedDict):
    """settings: all flags that name no file. files: hashes of all contents, by flag or part."""

    settings: dict[str, Any]
    files: Files


def digests_of_pairs(images: str, masks: str) -> dict[str, str]:
    """Hashes of radiograph and mask, with a space between, by name."""
    return {name: " ".join(digests(paths)) for name, *paths in pair_files(images, masks)}


def origin_of(
    given: Mapping[str, Any], train: Mapping[str, str], test: Mapping[str, str], **more: Any
) -> RunOrigin:
    """:param given: arguments of the training script.
    :param train: hashes of the pairs to train on, by name; `test`: to evaluate on.
    :param more: further settings, plain values.
    """
    settings: dict[str, Any] = dict(more)
    files: Files = {"train": dict(train), "test": dict(test)}
    for name, value in given.items():
        if name in _ELSEWHERE:
            continue
        if isinstance(value, str) and (os.path.exists(value) or packed.is_on_hub(value)):
            files[name] = {os.path.basename(os.path.normpath(value)): _content(value)}
        else:
            settings[name] = value
    return {"settings": settings, "files": files}


def union_of(members: Mapping[str, RunOrigin], variants: Mapping[str, list[str]]) -> RunOrigin:
    """What the figures of several networks' mean are made from.

    :param members: their origins by method, on the same images.
    """
    # those of older versions counted alike
    settings: dict[str, Any] = {"variants": dict(variants), "by_certainty": True}
    files: Files = {}
    for name, origin in members.items():
        settings[name] = {k: v for k, v in origin["settings"].items() if k != "variants"}
        for part, hashes in origin["files"].items():
            files[part if part in ("train", "test") else f"{name} {part}"] = hashes
    return {"settings": settings, "files": files}


def _content(path: str) -> str:
    """A hash of a file, of a packed network, or of all files below a folder."""
    if os.path.isfile(path) or packed.find(path):
        return digest(path)
    return combined(digests(list(find_files(path))))


def check_origin(folder: str, before: RunOrigin, now: RunOrigin) -> None:
    """:raises UserError: if a finished run in `folder` was made with other flags or contents."""
    known = {"precision": "fp32"}  # of older versions, which recorded none
    ours, theirs = known | now["settings"], known | before["settings"]
    found = changed_files(before["files"], now["files"])
    for name in sorted(ours.keys() | theirs.keys()):
        found += changes(f"--{name}", theirs.get(name), ours.get(name))
    if found:
        raise UserError(
            f"{folder} was made with other flags or data ({'; '.join(found)}): choose another"
            f" --output or another name for the method, or remove {folder} to repeat the run"
        )


def check_neighbours(results: Mapping[str, RunOrigin], now: Files) -> None:
    """:raises UserError: if a run, whatever its method, saw another image or mask of one name.

    :param results: by folder, the origins of the finished runs that the tables will show.
    """
    known = {"train": now["train"], "test": now["test"] or now["train"]}
    for folder, origin in results.items():
        files = origin["files"]
        then, here = (
            {part: {n: side[part][n] for n in known[part].keys() & files[part]} for part in known}
            for side in (files, known)
        )
        if found := changed_files(then, here):
            raise UserError(
                f"{folder} would share a table with other data ({'; '.join(found)}): choose"
                " another --output"
            )
