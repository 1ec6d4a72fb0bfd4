"""How a resumed run differs from the run so far: refused, or logged and recorded.

`config.json` holds the training's flags, under "data" the contents it learns from, under "began"
the checkpoint it began from, and under "history" every change since, with the step and the time.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import blobfile as bf

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import packed
from guided_diffusion.runtime.storage.contents import Files, changed_files, changes, digest, summary
from guided_diffusion.runtime.storage.resume import Start

# flags that change neither what is learnt nor from what; batch_size is per rank, see "global_batch"
_FREE = {
    *("data_dir", "seg_dir", "val_data_dir", "train_names", "categories", "init_checkpoint"),
    *("batch_size", "global_batch_size", "microbatch", "num_workers", "cache", "compile", "wandb"),
    *("log_interval", "save_interval", "save_minutes", "save_initial", "keep_checkpoints"),
    *("sample_interval", "dry_run", "weights_save", "visualize_process"),
    *("resume_checkpoint", "max_steps", "iterations", "eval_interval", "max_skipped_steps"),
}


# flags that cannot change within a folder, and what runs of older versions amount to
_FIXED = {"align_encoder": ""}


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a run learns from.

    data_dir: where the images are. images: their number. contents: hash of them all. files: hashes
    of every one, where there are but a few labelled ones: then a change is refused.
    """

    data_dir: str
    images: int
    contents: str = ""
    files: Files = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        data_dir: str,
        groups: Sequence[Sequence[str]],
        files: Files | None,
        labels: Sequence[int] = (),
    ) -> "Contents":
        """:param groups: each image, with its mask if it has one.
        :param files: of labelled images; None: a summary of `groups` will do.
        :param labels: classes of the images, which their names tell.
        """
        if files is not None:
            return cls(data_dir, len(groups), files=files)
        return cls(data_dir, len(groups), summary(groups, labels))

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """:param before: an earlier run's, as plain values."""
        if self.files or before.get("files"):
            return changed_files(before.get("files", {}), self.files)
        if self.contents == before.get("contents"):
            return []
        return [
            f"training images: {self.images} in {self.data_dir} instead of {before.get('images')}"
            f" in {before.get('data_dir')}, with other contents"
        ]


def training_sections(
    train: Any,
    data: Contents,
    start: Start,
    stored: Mapping[str, Any] | None,
    folder: str,
    ranks: int,
) -> tuple[dict[str, Any], list[str]]:
    """The sections of config.json about the training, and lines for the log.

    :param train: the flags, a dataclass.
    :param stored: the folder's own config.json, None for a new run.
    :raises UserError: if nothing is left to train with what has changed, if a labelled image or
        the encoder to align with has changed, or if the run began from another checkpoint than the
        flags name.
    """
    flags = dataclasses.asdict(train) | {"global_batch": train.batch_size * ranks}
    init = getattr(train, "init_checkpoint", "")
    named = init or train.resume_checkpoint
    is_file = bool(init) or (named not in ("", "auto", "none") and bf.dirname(named) != folder)
    now = {"training": flags, "data": dataclasses.asdict(data), "began": {}, "history": []}
    if stored is None:
        if is_file:
            now["began"] = {"checkpoint": named, "contents": digest(named)}
        return now, []
    began = stored.get("began", {})
    if init and began == {} and "began" in stored:
        raise UserError(
            f"{folder} holds a run that did not begin from --init_checkpoint {named}: omit the"
            " flag, or name another folder with --output (or --weights_save)"
        )
    if is_file and began and _exists(named) and digest(named) != began["contents"]:
        raise UserError(
            f"{folder} holds a run that began from {began['checkpoint']}, which has other contents"
            f" than {named}: name another folder with --output (or --weights_save)"
        )
    before = stored.get("training", {})
    for name, default in _FIXED.items():
        value, known_value = (source.get(name, default) for source in (flags, before))
        if value != known_value:
            raise UserError(
                f"--{name} {value!r} contradicts the run in {folder}, which says {known_value!r}:"
                " give the same, or continue from its model*.pt in another folder, with --output"
                " and --resume_checkpoint"
            )
    settings = changed_settings(before, flags)
    known = stored.get("data")
    contents = data.differences(known) if known else []
    found = settings + contents
    limit = train.max_steps or train.lr_anneal_steps
    longer = flags["lr_anneal_steps"] > before.get("lr_anneal_steps", 0) > 0
    fixed = [text for text in found if not (longer and text.startswith("lr_anneal_steps "))]
    _check(found, start, limit, fixed if data.files else [], folder)
    history = list(stored.get("history", []))
    if found:
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        entry = {"step": start.step, "time": time, "changed": found}
        if contents:
            entry["data_before"] = known
        history.append(entry)
    notes = [f"changed at step {start.step}: {text}" for text in found]
    if not known:
        notes.append(
            "config.json is of an older version, which did not record the contents of the images:"
            " whether they have changed is unknown"
        )
    return {**now, "began": began, "history": history}, notes


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How flags of the training that change what is learnt differ, in words.

    :param before: as config.json holds them; what an older version did not record is left out.
    """
    return [
        text
        for name, value in now.items()
        if name not in _FREE and name in before
        for text in changes(name, before[name], value)
    ]


def _exists(named: str) -> bool:
    """Whether a checkpoint is there to compare with; one on the Hub may be out of reach."""
    if not packed.is_on_hub(named):
        return bf.exists(named)
    with contextlib.suppress(UserError):
        return packed.find(named) is not None
    return False


def _check(
    found: Sequence[str], start: Start, limit: int, fixed: Sequence[str], folder: str
) -> None:
    """:raises UserError: for changes that must not be, `fixed`, or that would have no effect."""
    if not found:
        return
    if fixed:
        raise UserError(
            f"{folder} holds another run ({'; '.join(fixed)}): choose another --weights_save or"
            " --output"
        )
    if limit and start.step >= limit:
        raise UserError(
            f"{folder} holds a complete run of {start.step} steps, so the changes would have no"
            f" effect ({'; '.join(found)}): name another folder with --output, or raise the"
            " number of steps to continue it"
        )
