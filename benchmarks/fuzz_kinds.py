"""What fuzz_readers.py damages: valid files, mutations that suit them, and their readers."""

import csv
import io
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from guided_diffusion.runtime.errors import UserError

Mutation = Callable[[bytes, np.random.Generator], bytes]
JUNK = (None, -1, 0, 7, 10**6, 0.5, 1e300, float("nan"), True, "", "1,2", "a\nb", "x" * 300, [], {})


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    files: valid content by name. read: of a damaged file; raises UserError to refuse it, ValueError
    if it accepts what it should not. mutate: a mutation besides flipped bits and truncation.
    beside: undamaged files that lie in the same folder.
    """

    files: Mapping[str, bytes]
    read: Callable[[str], object]
    mutate: Mutation | None = None
    beside: Mapping[str, bytes] | None = None

    def names(self, path: str) -> list[str]:
        """Paths of which a message may name any instead: the files beside the damaged one."""
        return [_beside(path, name) for name in self.beside or ()]


def images() -> Kind:
    """Radiographs, under every intensity rule."""
    import fuzz_images

    from guided_diffusion.images.image_io import Intensity, bit_depth, pixel_spacing, read_image

    rules = [Intensity("full"), Intensity("percentile"), Intensity("window")]

    def read(path: str) -> None:
        for rule in rules:
            image = read_image(path, None, rule)
            if image.dtype != np.uint8 and not (image.min() >= 0 and image.max() <= 1):
                raise ValueError(f"levels from {image.min()} to {image.max()}")
        bit_depth(path)
        pixel_spacing(path)

    return Kind(fuzz_images.valid_files(), read)


def masks() -> Kind:
    """Masks of class indices, and black and white ones."""
    from guided_diffusion.images.masks import MaskRule

    rows, columns = np.mgrid[0:40, 0:56]
    indices = (rows // 8 + columns // 30).astype(np.uint8)
    bordered = np.where(rows < 3, 255, indices).astype(np.uint8)
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    white = Image.fromarray(((indices > 2) * 255).astype(np.uint8))
    pictures = {
        "index.png": Image.fromarray(indices),
        "border.png": Image.fromarray(bordered),
        "palette.png": palette,
        "palette.gif": palette,
        "white.png": white,
        "white.jpg": white,
        "bits.png": white.convert("1"),
        "bits.tif": white.convert("1"),
        "deep.png": Image.fromarray(indices.astype(np.uint16)),
        "index.tif": Image.fromarray(indices),
        "index.bmp": Image.fromarray(indices),
        "index.webp": Image.fromarray(indices),
    }
    rules = (MaskRule(7), MaskRule(None, (255,)), MaskRule(binary=True))

    def read(path: str) -> None:
        refused, accepted = None, 0
        for rule in rules:
            try:
                found = rule.read(path)
            except UserError as error:
                refused = error
            else:
                accepted += 1
                classes = found[found != 255]
                if rule.classes and classes.size and classes.max() >= rule.classes:
                    raise ValueError(f"class {classes.max()}")
        if refused and not accepted:
            raise refused

    return Kind({name: _saved(name, picture) for name, picture in pictures.items()}, read)


def categories() -> Kind:
    """Class tables."""
    from guided_diffusion.segmentation.categories import (
        generic_categories,
        load_categories,
        to_plain,
    )

    files = {
        f"{name}.json": json.dumps(to_plain(generic_categories(n)), indent=indent).encode()
        for name, n, indent in (("two", 2, None), ("seven", 7, 2))
    }
    return Kind(files, load_categories, junk_in_json)


def groups() -> Kind:
    """CSV files that say which patient a radiograph is of."""
    from guided_diffusion.preparation.organize import read_groups

    names = [f"film_{n:03d}" for n in range(8)]
    files = {}
    for name, ending, delimiter in (("plain", "", ","), ("extensions", ".png", ",")):
        text = io.StringIO()
        lines = [(f"{film}{ending}", f"patient {n // 2}") for n, film in enumerate(names)]
        csv.writer(text, delimiter=delimiter).writerows([("name", "group"), *lines])
        files[f"{name}.csv"] = text.getvalue().encode()
    return Kind(files, lambda path: read_groups(names, path), junk_in_text)


def config() -> Kind:
    """config.json beside a checkpoint."""
    from guided_diffusion.networks.trained import read_trained

    network, weights = _tiny()

    def read(path: str) -> None:
        trained = read_trained(_beside(path, "model000010.pt"), {})
        trained.network("cpu")
        trained.diffusion.build()

    return Kind(
        {"config.json": _config(network)},
        read,
        junk_in_json,
        {"model000010.pt": _saved_weights(weights)},
    )


def checkpoint() -> Kind:
    """Checkpoints of pretraining; one that is read must hold the weights that were written."""
    from guided_diffusion.networks.trained import read_trained

    network, weights = _tiny()

    def read(path: str) -> None:
        read_trained(path, {}).network("cpu")
        _compare(read_trained(path, {}).weights, weights)

    return Kind(
        {"model000010.pt": _saved_weights(weights)},
        read,
        lambda content, rng: junk_in_pickle(content, rng, weights),
        {"config.json": _config(network)},
    )


def model() -> Kind:
    """segm.pth; one that is read must hold the weights that were written."""
    import torch as th

    from guided_diffusion.images.reading import ReadingConfig
    from guided_diffusion.segmentation.categories import generic_categories
    from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model

    network, _ = _tiny()
    stored = SegmentationConfig(network, ReadingConfig(16, 1), generic_categories(3))
    weights = stored.build().state_dict()
    values = {**stored.to_plain(), "state_dict": weights}
    content = io.BytesIO()
    th.save(values, content)

    def read(path: str) -> None:
        _compare(load_model(path)[0].state_dict(), weights)

    return Kind(
        {"segm.pth": content.getvalue()},
        read,
        lambda content, rng: junk_in_pickle(content, rng, values),
    )


def log() -> Kind:
    """progress.csv of a run that resumes, and that is plotted."""
    from guided_diffusion.runtime.log_formats import CSVOutputFormat
    from guided_diffusion.segmentation.visuals.render import plot_curves

    steps = "".join(f"{step},{1 / (step + 1):.4f},{step / 40:.3f}\n" for step in range(40))
    content = f"step,loss,dice_mean\n{steps}".encode()

    def read(path: str) -> None:
        with open(path, "rb") as file:
            if zlib.crc32(file.read()) % 16 == 0:  # slow
                with warnings.catch_warnings():  # characters that no font has
                    warnings.simplefilter("ignore")
                    plot_curves(path, path + ".png")
        resumed = CSVOutputFormat(path, 20)
        resumed.writekvs({"step": 21, "loss": 0.5, "new": 1})
        resumed.close()

    return Kind({"progress.csv": content}, read, junk_in_text)


def samples() -> Kind:
    """Archives of image_sample.py."""
    from guided_diffusion.sampling.images import read_npz

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    plain, compressed = io.BytesIO(), io.BytesIO()
    np.savez(plain, images)
    np.savez_compressed(compressed, images, np.arange(3))

    def read(path: str) -> None:
        if not np.array_equal(read_npz(path)[0], images):
            raise ValueError("other images were accepted")

    return Kind({"plain.npz": plain.getvalue(), "labelled.npz": compressed.getvalue()}, read)


def packed_config() -> Kind:
    """See `fuzz_packed.py`."""
    import fuzz_packed

    return fuzz_packed.packed_config()


def packed_weights() -> Kind:
    """See `fuzz_packed.py`."""
    import fuzz_packed

    return fuzz_packed.packed_weights()


def annotations() -> Kind:
    """Files of annotation tools."""
    import fuzz_annotations

    return Kind(
        fuzz_annotations.valid_files(),
        fuzz_annotations.read,
        fuzz_annotations.mutate,
        fuzz_annotations.images(),
    )


KINDS = {
    "images": images,
    "masks": masks,
    "categories": categories,
    "config": config,
    "model": model,
    "checkpoint": checkpoint,
    "groups": groups,
    "log": log,
    "samples": samples,
    "packed_config": packed_config,
    "packed_weights": packed_weights,
    "annotations": annotations,
}


def make(names: Sequence[str]) -> dict[str, Kind]:
    """The kinds of these names; what a kind needs is imported only then."""
    return {name: KINDS[name]() for name in names}


def junk_in_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Replace, remove or double one value anywhere in a JSON file."""
    return json.dumps(_with_junk(json.loads(content), rng)).encode()


def junk_in_text(content: bytes, rng: np.random.Generator) -> bytes:
    """Insert characters that mean something to CSV, or that are no text."""
    pieces = (
        b'"',
        b",",
        b";",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b'""',
        b"\xe2\x80\xa8",
        b"x" * 200_000,
    )
    place = int(rng.integers(len(content)))
    return content[:place] + pieces[rng.integers(len(pieces))] + content[place:]


def junk_in_pickle(content: bytes, rng: np.random.Generator, values: Any) -> bytes:
    """A file that torch wrote without a fault, of which one value is junk; or a torn ZIP."""
    import torch as th

    if rng.integers(4) == 0:  # the archive without one of its records
        torn = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(torn, "w") as new:
            names = old.namelist()
            gone = names[rng.integers(len(names))]
            for name in names:
                if name != gone:
                    new.writestr(old.getinfo(name), old.read(name))  # of the same date
        return torn.getvalue()
    damaged = io.BytesIO()
    th.save(_with_junk(values, rng), damaged)
    return damaged.getvalue()


def _with_junk(value: Any, rng: np.random.Generator) -> Any:
    """A copy in which one value, at a random depth, is replaced, removed or doubled."""
    if not isinstance(value, dict | list) or not value or rng.integers(6) == 0:
        return JUNK[rng.integers(len(JUNK))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[rng.integers(len(keys))]
    copied = dict(value) if isinstance(value, dict) else list(value)
    action = rng.integers(8)
    if action == 0:
        del copied[key]
    elif action == 1 and isinstance(copied, list):
        copied.append(copied[key])
    else:
        copied[key] = _with_junk(value[key], rng)
    return copied


def _tiny() -> tuple[Any, Any]:
    """The configuration of a tiny diffusion network, and weights for it."""
    import torch as th

    from guided_diffusion.networks.config import ModelConfig

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
    return network, network.build().state_dict()


def _config(network: Any) -> bytes:
    import dataclasses

    from guided_diffusion.images.reading import ReadingConfig
    from guided_diffusion.networks.config import DiffusionConfig

    sections = {
        "kind": "diffusion",
        "model": dataclasses.asdict(network),
        "diffusion": dataclasses.asdict(DiffusionConfig(diffusion_steps=50)),
        "reading": ReadingConfig(16, 1).to_dict(),
        "classes": [],
    }
    return json.dumps(sections, indent=2).encode()


def _saved(name: str, picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    ending = os.path.splitext(name)[1]
    options = {"lossless": True} if ending == ".webp" else {}
    picture.save(stream, Image.registered_extensions()[ending], **options)
    return stream.getvalue()


def _saved_weights(weights: Any) -> bytes:
    import torch as th

    stream = io.BytesIO()
    th.save(weights, stream)
    return stream.getvalue()


def _beside(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


def _compare(found: Any, expected: Any) -> None:
    import torch as th

    if found.keys() != expected.keys():
        raise ValueError("other weights were accepted")
    for name, value in expected.items():
        if not th.equal(found[name], value):
            raise ValueError(f"{name} was read with other values than were written")
