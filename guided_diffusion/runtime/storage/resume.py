"""Where a run resumes: at the newest checkpoint in its folder, or at a file that the user names."""

import re
from typing import Any, NamedTuple

import blobfile as bf

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint


class Start(NamedTuple):
    """Where a run begins.

    step: optimisation steps already done. path: the model file to begin from, "" for random
    weights. state: contents of `stateN.pt`, None for a checkpoint of the original package.
    """

    step: int = 0
    path: str = ""
    state: dict[str, Any] | None = None


def locate_start(folder: str, resume_checkpoint: str = "") -> Start:
    """Where the run in `folder` resumes.

    :param resume_checkpoint: "auto" or "": at the newest complete checkpoint in the folder, if
        any; "none": from scratch; otherwise at this model or EMA file, unless the folder holds a
        later checkpoint: then the command of a run that has already moved on was rerun.
    :raises UserError: if the named file is missing, or if "none" would overwrite checkpoints.
    """
    found = checkpoint.newest_state(folder)
    if resume_checkpoint == "none":
        if found:
            raise UserError(
                f"{folder} holds checkpoints up to step {found[0]}, which --resume_checkpoint none"
                " would overwrite: name another folder with --output"
            )
        return Start()
    newest = Start()
    if found:
        step, contents = found
        newest = Start(step, bf.join(folder, checkpoint.step_name("model", step)), contents)
    if resume_checkpoint in ("", "auto"):
        if not found and (foreign := checkpoint.foreign_models(folder)):
            raise UserError(
                f"{folder} holds {foreign[-1]}, written by another program: start from it with"
                f" --resume_checkpoint {bf.join(folder, foreign[-1])}, or name another"
                " folder with --output"
            )
        return newest
    if not bf.exists(resume_checkpoint):
        raise UserError(f"--resume_checkpoint {resume_checkpoint}: there is no such file")
    step = parse_resume_step_from_filename(resume_checkpoint)
    if newest.step > step:
        return newest
    source = bf.dirname(resume_checkpoint)
    state = None
    if step in checkpoint.complete_steps(source) and not is_ema(resume_checkpoint):
        state = checkpoint.read_state(source, step)
    return Start(step, resume_checkpoint, state)


def is_ema(path: str) -> bool:
    """Whether a file's name is that of averaged weights."""
    return bf.basename(path).startswith("ema_")


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in names like `model010000.pt` and `ema_0.9999_010000.pt`; 0 if there is none."""
    match = re.search(r"(?:model|ema_[^_]+_)(\d+)\.pt$", bf.basename(filename))
    return int(match.group(1)) if match else 0


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The EMA file that belongs to a model file, if it exists."""
    if not main_checkpoint:
        return None
    name = checkpoint.step_name(checkpoint.ema_prefix(rate), step)
    path = bf.join(bf.dirname(main_checkpoint), name)
    return path if bf.exists(path) else None
