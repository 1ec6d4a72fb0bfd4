"""A network as a folder to share: `model.safetensors`, and `config.json` with all else.

Such a folder stands for a checkpoint wherever one is read, and so does `hf://USER/REPO`, a
repository of the Hugging Face Hub that holds one. tools/pack_model.py writes them.
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_sections, save_json, write_atomically
from guided_diffusion.runtime.storage.fingerprints import file_fingerprint
from guided_diffusion.runtime.text import one_line

if TYPE_CHECKING:
    import torch as th

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# in a configuration: the folder holds weights alone, as a run's model*.pt and ema_*.pt do
NETWORK_FORMAT = "guided-diffusion network 1"
_HUB = "hf://"
_REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+?)(@[\w./-]+)?/?")


def is_on_hub(path: str) -> bool:
    return path.startswith(_HUB)


def find(path: str) -> str | None:
    """The local folder of a packed network; None if the path is another file or folder.

    :raises UserError: if a repository cannot be had.
    """
    if is_on_hub(path):
        return _download(path)
    return path if path and os.path.isfile(os.path.join(path, WEIGHTS)) else None


def weights_file(path: str) -> str:
    """The file that holds a checkpoint's weights: the path itself unless it is packed."""
    folder = find(path)
    return path if folder is None else os.path.join(folder, WEIGHTS)


def read(folder: str, path: str) -> dict[str, Any]:
    """What torch.load returns for the file that was packed: weights, or plain values beside them.

    :param path: by which the user named the folder.
    :raises UserError: if the folder is incomplete, damaged, or none that this package wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(os.path.join(folder, CONFIG)):
        raise UserError(f"{path} lacks {CONFIG}: copy the whole folder of tools/pack_model.py")
    values = read_sections(os.path.join(folder, CONFIG))
    recorded = values.pop("weights", None)
    if not isinstance(recorded, Mapping) or set(recorded) != {"size", "crc"}:
        raise UserError(
            f"{path} describes no network of this package; expected a folder of tools/pack_model.py"
        )
    file = os.path.join(folder, WEIGHTS)
    found = file_fingerprint(file)
    if found != recorded:
        what = f"{found['size']} bytes instead of {recorded['size']}"
        raise UserError(
            f"{file} is damaged, or of another network than {CONFIG} beside it"
            f" ({what if found['size'] != recorded['size'] else 'its checksum differs'}): copy the"
            " folder again"
        )
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable file of weights: {_line(error)}") from error
    if values.get("format") == NETWORK_FORMAT:
        return weights
    return {**values, "state_dict": weights}


def write(folder: str, config: Mapping[str, Any], weights: "Mapping[str, th.Tensor]") -> None:
    """Write weights and configuration, which comes last: without it the folder is not complete.

    :param config: plain values for JSON.
    """
    from safetensors.torch import save

    content = save({name: tensor.contiguous().clone() for name, tensor in weights.items()})
    path = os.path.join(folder, WEIGHTS)
    write_atomically(path, lambda file: file.write(content))
    save_json(os.path.join(folder, CONFIG), {**config, "weights": file_fingerprint(path)})


@functools.cache
def _download(path: str) -> str:
    """The folder in the Hub's cache that holds a repository's network, downloaded if need be."""
    match = _REPOSITORY.fullmatch(path)
    if match is None:
        raise UserError(f"{path}: expected hf://USER/REPO, or hf://USER/REPO@REVISION")
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise UserError(
            f"{path} needs the package huggingface_hub: pip install '.[hub]' in the checkout"
        ) from error
    repository, revision = match[1], (match[2] or "@")[1:] or None
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=[WEIGHTS, CONFIG, CARD]
        )
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{path} is not in the local cache, and the Hub cannot be reached: connect once, or"
            " name a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = "it does not exist, or is private" if status in (401, 403, 404) else _line(error)
        raise UserError(f"{path} cannot be downloaded: {reason}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be downloaded: {_line(error)}") from error
    if not os.path.isfile(os.path.join(folder, WEIGHTS)):
        raise UserError(f"{path} holds no {WEIGHTS}: expected a folder of tools/pack_model.py")
    return folder


def _line(error: Exception) -> str:
    """What an error of a library says, on one line."""
    return one_line(error) or type(error).__name__
