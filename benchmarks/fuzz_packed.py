"""What fuzz_readers.py damages of packed models: their configuration, and their weights."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np
from fuzz_kinds import JUNK, Kind, junk_in_json

from guided_diffusion.runtime.storage import packed
from guided_diffusion.runtime.storage.fingerprints import file_fingerprint


@dataclass(frozen=True)
class _Folder(Kind):
    """Files of a folder, which messages may name instead."""

    def names(self, path: str) -> list[str]:
        return [os.path.dirname(path)]


def packed_config() -> Kind:
    """config.json of a packed segmentation model."""
    from guided_diffusion.segmentation.model_file import load_model

    files = _segmentation()
    beside = {packed.WEIGHTS: files[packed.WEIGHTS]}

    def read(path: str) -> None:
        load_model(os.path.dirname(path))

    return _Folder({packed.CONFIG: files[packed.CONFIG]}, read, junk_in_json, beside)


def packed_weights() -> Kind:
    """model.safetensors whose size and checksum are those that config.json records: damage that
    was made on purpose."""
    from guided_diffusion.segmentation.model_file import load_model

    files = _segmentation()
    config = json.loads(files[packed.CONFIG])

    def read(path: str) -> None:
        recorded = {**config, "weights": file_fingerprint(path)}
        with open(os.path.join(os.path.dirname(path), packed.CONFIG), "w") as file:
            json.dump(recorded, file)
        load_model(os.path.dirname(path))

    return _Folder({packed.WEIGHTS: files[packed.WEIGHTS]}, read, _junk_in_header)


def _segmentation() -> dict[str, bytes]:
    """The files of a tiny packed model."""
    import torch as th

    from guided_diffusion.images.reading import ReadingConfig
    from guided_diffusion.networks.config import ModelConfig
    from guided_diffusion.segmentation.categories import generic_categories
    from guided_diffusion.segmentation.model_file import SegmentationConfig

    network = ModelConfig(
        image_size=16,
        in_channels=1,
        num_channels=32,
        num_res_blocks=1,
        num_head_channels=16,
        channel_mult="1,2",
        attention_resolutions="8",
    )
    th.manual_seed(0)
    config = SegmentationConfig(network, ReadingConfig(16, 1), generic_categories(3))
    folder = tempfile.mkdtemp()
    try:
        packed.write(folder, config.to_plain(), config.build().state_dict())
        found = {}
        for name in (packed.CONFIG, packed.WEIGHTS):
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
        return found
    finally:
        shutil.rmtree(folder)


def _junk_in_header(content: bytes, rng: np.random.Generator) -> bytes:
    """Weights under a header in which one value is junk; or a header of another length."""
    length = int.from_bytes(content[:8], "little")
    if rng.integers(4) == 0:
        return int(rng.integers(2**62)).to_bytes(8, "little") + content[8:]
    header = json.loads(content[8 : 8 + length])
    entry = header[list(header)[rng.integers(len(header))]]
    if not isinstance(entry, dict) or "shape" not in entry or rng.integers(4) == 0:
        header["x"] = JUNK[rng.integers(len(JUNK))]
    else:
        entry[list(entry)[rng.integers(len(entry))]] = JUNK[rng.integers(len(JUNK))]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
