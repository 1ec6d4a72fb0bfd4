"""Checkpoints of a run: written atomically, found again, verified, pruned.

A checkpoint at step N consists of `modelN.pt`, `ema_RATE_N.pt` and `optN.pt`, as guided-diffusion
names them, and `stateN.pt`, which is written last and lists the others with their sizes and
checksums: a checkpoint without it is incomplete and ignored. `config.json` beside them describes
the network, the diffusion process and how images are read.
"""

import contextlib
import dataclasses
import io
import os
import pickle
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import blobfile as bf
import torch as th

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import packed, run_lock
from guided_diffusion.runtime.storage.files import (
    is_local,
    read_sections,
    remove_file,
    save_json,
    write_atomically,
    writing,
)
from guided_diffusion.runtime.storage.fingerprints import Fingerprint, file_fingerprint
from guided_diffusion.runtime.text import one_line

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CONFIG_NAME = "config.json"
STEP_DIGITS = 6


class _Checksum(io.RawIOBase):
    """Passes bytes on to a file while computing their fingerprint."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.fingerprint: Fingerprint = {"size": 0, "crc": 0}

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer") -> int:
        size = memoryview(data).nbytes
        self.fingerprint["size"] += size
        self.fingerprint["crc"] = zlib.crc32(data, self.fingerprint["crc"])
        self.file.write(data)
        return size


def save(path: str, value: Any) -> Fingerprint:
    """Save tensors and plain values atomically; returns the fingerprint of the file."""
    fingerprint: Fingerprint = {"size": 0, "crc": 0}
    write_atomically(path, lambda file: fingerprint.update(_write(value, file)))
    return fingerprint


def try_saving(folder: str, value: Any) -> int:
    """Save to a nameless file on the disk of a folder, which need not exist; nothing remains.

    :param folder: for one in the cloud the file is a local temporary one.
    :return: the size of the file, bytes.
    """
    base = os.path.abspath(folder) if is_local(folder) else tempfile.gettempdir()
    while not os.path.isdir(base):
        base = os.path.dirname(base)
    with writing(folder), tempfile.TemporaryFile(dir=base) as file:
        size = _write(value, file)["size"]
        file.flush()
        os.fsync(file.fileno())
    return size


def _write(value: Any, file: IO[bytes]) -> Fingerprint:
    checksum = _Checksum(file)
    with io.BufferedWriter(checksum) as buffered:
        th.save(value, buffered)
    return checksum.fingerprint


def load(path: str, **options: Any) -> Any:
    """Read a file of tensors and plain values, local or in the cloud; nothing in it is executed.

    :param path: of a file, or a packed network (see `packed.py`).
    :param options: for torch.load; by default map_location="cpu" and weights_only=True.
    :raises UserError: if it is missing or cannot be read.
    """
    if (folder := packed.find(path)) is not None:
        return packed.read(folder, path)
    options = {"map_location": "cpu", "weights_only": True, **options}
    try:
        if is_local(path):
            # torch warns about every file saved by an old version, which helps no user
            _check_records(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return th.load(path, **options)
        with bf.BlobFile(path, "rb") as file:
            content = io.BytesIO(file.read())
        _check_records(path, content)
        return th.load(content, **options)
    except (FileNotFoundError, IsADirectoryError):
        kind = "a folder" if bf.isdir(path) else "missing"
        raise UserError(
            f"checkpoint {path} is {kind}: name a .pt or .pth file, or a folder with"
            f" {packed.WEIGHTS}"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a damaged file raises anything
        reason = "it is damaged, or no file of torch.save; copy or save it again"
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds more than tensors and plain values; save only these"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UserError(f"{path} is not a readable checkpoint: {reason}") from error


def load_weights(model: th.nn.Module, path: str) -> None:
    """Give a network the weights in a file.

    :raises UserError: if they are another network's.
    """
    weights = load(path)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        told = isinstance(error, RuntimeError)  # torch's, which names weights and shapes
        reason = one_line(error, 300) if told else "it is not a state_dict"
        raise UserError(
            f"{path} does not fit the network that the flags describe: {reason}"
        ) from error


def step_name(prefix: str, step: int) -> str:
    """The name of a file, such as `model010000.pt`, `ema_0.9999_010000.pt` or `opt010000.pt`."""
    return f"{prefix}{step:0{STEP_DIGITS}d}.pt"


def ema_prefix(rate: float | str) -> str:
    """The prefix of the files that hold the exponential moving average of a rate."""
    return f"ema_{rate}_"


def complete_steps(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    if not bf.isdir(folder):
        return []
    names = (re.fullmatch(r"state(\d+)\.pt", name) for name in bf.listdir(folder))
    return sorted(int(match.group(1)) for match in names if match)


def foreign_models(folder: str) -> list[str]:
    """Names of the files `modelN.pt` in a folder not written by this package, oldest first."""
    if not bf.isdir(folder) or complete_steps(folder) or bf.exists(bf.join(folder, CONFIG_NAME)):
        return []
    return sorted(name for name in bf.listdir(folder) if re.fullmatch(r"model\d+\.pt", name))


def save_step(folder: str, step: int, parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Save one complete checkpoint.

    :param folder: local or cloud folder.
    :param parts: the content of each file by its prefix ("model", "ema_0.9999_", "opt").
    :param state: plain values and tensors that resuming needs besides, for `stateN.pt`.
    """
    run_lock.check_held()
    remove_temporaries(folder)  # their disk space may be needed
    for prefix in ("state", *parts):
        if bf.exists(path := bf.join(folder, step_name(prefix, step))):
            bf.remove(path)
    files: dict[str, Fingerprint] = {}
    for prefix, value in parts.items():
        name = step_name(prefix, step)
        files[name] = save(bf.join(folder, name), value)
    save(bf.join(folder, step_name("state", step)), {"step": step, "files": files, **state})


def read_state(folder: str, step: int) -> dict[str, Any] | None:
    """The content of `stateN.pt`; None, with a warning, if a file of the checkpoint is damaged."""
    path = bf.join(folder, step_name("state", step))
    try:
        state = load(path)
        if state["step"] != step:
            raise UserError(f"{path} belongs to step {state['step']}")
        for name, expected in state["files"].items():
            part = bf.join(folder, name)
            if not bf.exists(part):
                raise UserError(f"{part} is missing")
            if file_fingerprint(part) != expected:
                raise UserError(f"{part} is damaged: size or checksum differ from when written")
    except (UserError, KeyError, TypeError, zipfile.BadZipFile) as error:
        warnings.warn(f"checkpoint at step {step} is unusable: {error}", stacklevel=2)
        return None
    return state


def _check_records(path: str, content: BinaryIO | None = None) -> None:
    """Verify the checksums inside a .pt file, which is a ZIP archive: torch.load ignores them.

    Files of torch before 1.6 are no archives, and have none.

    :param content: of the file; by default a local file is read.
    """
    with open(path, "rb") if content is None else contextlib.nullcontext(content) as file:
        if file.read(4) != b"PK\3\4":
            file.seek(0)
            return
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            if (name := archive.testzip()) is not None:
                raise UserError(
                    f"{path} is damaged: its part {name} differs from when written; copy it again"
                )
        file.seek(0)


def newest_state(folder: str) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest complete and undamaged checkpoint in a folder."""
    for step in reversed(complete_steps(folder)):
        if (state := read_state(folder, step)) is not None:
            return step, state
    return None


def prune(folder: str, keep: int, newest: int) -> None:
    """Remove all but `keep` complete checkpoints up to step `newest`, the one just written.

    Later ones, left by a run that went back because they are damaged, do not count.

    :param keep: 0 keeps all.
    """
    steps = [step for step in complete_steps(folder) if step <= newest]
    for step in steps[: -keep or None] if keep > 0 else []:
        remove_step(folder, step)


def remove_step(folder: str, step: int) -> None:
    """Remove what there is of the checkpoint at a step."""
    ending = f"{step:0{STEP_DIGITS}d}.pt"
    # the state first, so that an interruption leaves an incomplete checkpoint
    if bf.exists(state := bf.join(folder, f"state{ending}")):
        bf.remove(state)
    for name in bf.listdir(folder):
        if re.fullmatch(rf"(model|opt|ema_[^_]+_){re.escape(ending)}", name):
            bf.remove(bf.join(folder, name))


def remove_temporaries(folder: str) -> None:
    """Remove files that killed processes left half-written."""
    if is_local(folder) and os.path.isdir(folder):
        for name in os.listdir(folder):
            if re.fullmatch(r"\.(config|model|ema_|opt|state|progress\.).*\.\d+\.tmp", name):
                remove_file(os.path.join(folder, name))


def write_config(folder: str, sections: Mapping[str, Any]) -> None:
    """Write `config.json` with one section for each dataclass or plain value."""
    plain = {
        name: dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for name, value in sections.items()
    }
    save_json(bf.join(folder, CONFIG_NAME), plain)


def read_config(checkpoint: str) -> dict[str, Any] | None:
    """The content of `config.json` beside a checkpoint (or in a folder); None if there is none.

    :raises UserError: if it is not valid JSON, or no table of sections.
    """
    checkpoint = packed.find(checkpoint) or checkpoint
    folder = checkpoint if bf.isdir(checkpoint) else bf.dirname(checkpoint)
    path = bf.join(folder, CONFIG_NAME) if folder else CONFIG_NAME
    return read_sections(path) if bf.exists(path) else None
