"""What several test files share: tiny data, a tiny pretrained network, scripts run in-process."""

import contextlib
import functools
import getpass
import hashlib
import io
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import images_util
import numpy as np
import pytest
import torch as th
from golden_util import fill_parameters
from paths import ROOT
from PIL import Image

from guided_diffusion import dist_util, logger
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks import precision
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.preparation.phantoms import write_dataset
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint

# torch's cache of compiled code does not tell apart the instructions that this variable allows:
# what was compiled for others gives nan, or ends the process
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir(), f"torchinductor_{capability}_{getpass.getuser()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

# a shell starts background jobs with Ctrl-C ignored, and their children would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = ModelConfig(
    image_size=16,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    num_head_channels=16,
    channel_mult="1,2",
    attention_resolutions="8",
    learn_sigma=True,
    resblock_updown=True,
)
TINY_DIFFUSION = DiffusionConfig(learn_sigma=True, diffusion_steps=50, noise_schedule="cosine")


# files that take longest: they begin first, so that no process is left with one at the end
SLOW = (
    *("test_flag_values.py", "test_dry_run.py", "test_label_efficiency.py", "test_outputs.py"),
    *("test_on_gpu.py", "test_benchmarks.py", "test_variants.py", "test_resume.py"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SLOW)


class Outcome(NamedTuple):
    """How a script ended."""

    code: int
    out: str
    err: str


def run_script(name: str, *argv: object) -> Outcome:
    """Run `scripts/NAME`, `tools/NAME` or `benchmarks/NAME` in this process, as a user would."""
    folders = ("scripts", "tools", "benchmarks")
    path = next(p for p in (ROOT / folder / name for folder in folders) if p.exists())
    out, err = io.StringIO(), io.StringIO()
    before, code = sys.argv, 0
    sys.argv = [str(path), *map(str, argv)]
    sys.path.insert(0, str(path.parent))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except UserError as error:  # raised before main: an import that only a script makes
        raise AssertionError(f"a traceback instead of one line: {error}") from error
    finally:
        sys.argv = before
        sys.path.remove(str(path.parent))
        logger.reset()
        dist_util.cleanup()
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", autouse=True)
def _no_bf16_units():
    """On every machine, commands run in this process take the CPU for one without bfloat16 units.

    So exact numbers are float32's everywhere, and tiny networks, which gain nothing from bfloat16,
    lose no time. Commands in processes of their own do as the machine does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "computes_bf16_faster", lambda: False)
        yield


@pytest.fixture
def bf16_units(monkeypatch):
    """Commands take the CPU for one that computes bfloat16 faster than float32."""
    monkeypatch.setattr(precision, "computes_bf16_faster", lambda: True)


@pytest.fixture
def folder(tmp_path):
    """The run's folder, logged into."""
    logger.configure(str(tmp_path / "run"), ["csv"])
    yield tmp_path / "run"
    logger.reset()


@pytest.fixture
def script(monkeypatch, tmp_path):
    """`run_script` in a temporary folder, without the user's own OPENAI_LOGDIR."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    return run_script


@pytest.fixture(autouse=True)
def _no_curves(request, monkeypatch):
    """Fine-tuning leaves an empty file for its curves, but in tests marked `curves`: drawing them
    takes longer than to train a tiny network."""
    if "curves" not in request.keywords:
        from guided_diffusion.segmentation.training import loop

        monkeypatch.setattr(loop, "plot_curves", lambda log, path, *_: Path(path).touch())


@pytest.fixture
def save(tmp_path):
    """Save an array or a picture in a temporary folder with Pillow; returns the path."""
    return functools.partial(images_util.save_picture, tmp_path)


@pytest.fixture
def dicom(tmp_path):
    """Write a DICOM file in a temporary folder; returns the path. See `images_util.write_dicom`."""
    return functools.partial(images_util.write_dicom, tmp_path)


@pytest.fixture
def prepare(script):
    """Run tools/prepare_data.py: (exit code, stdout, stderr)."""
    return functools.partial(script, "prepare_data.py")


PHANTOM_SIZE = (72, 72)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A faultless data set, not to be changed: 30 phantoms in TRAIN, 6 in VAL."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_dataset(str(folder), 0, 30, 6, size=PHANTOM_SIZE, seed=1)
    return folder / "Split"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def draw_pairs(folder: Path, count: int, size=(16, 20), classes: int = 3, seed: int = 0) -> None:
    """Write `folder/IMG` and `folder/MASK`: noisy pictures of bands whose grey tells the class."""
    rng = np.random.default_rng(seed)
    for part in ("IMG", "MASK"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = size
        edges = np.sort(rng.integers(1, width, classes - 1))
        mask = np.broadcast_to(np.searchsorted(edges, np.arange(width), "right"), size)
        grey = 40 + 170 * mask / (classes - 1) + rng.normal(0, 6, (height, width))
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / "IMG" / f"r{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "MASK" / f"r{i}.png")


@pytest.fixture
def split(tmp_path) -> Path:
    """Split/TRAIN and Split/VAL with 3 and 2 labelled pictures of 3 classes."""
    draw_pairs(tmp_path / "Split" / "TRAIN", 3)
    draw_pairs(tmp_path / "Split" / "VAL", 2, seed=1)
    return tmp_path / "Split"


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A checkpoint of a tiny network with its config.json."""
    th.manual_seed(0)
    folder = tmp_path / "pretrained"
    folder.mkdir()
    model = fill_parameters(TINY.build())
    th.save(model.state_dict(), folder / "model000010.pt")
    sections = {
        "model": TINY,
        "diffusion": TINY_DIFFUSION,
        "reading": ReadingConfig(16, 1).to_dict(),
    }
    checkpoint.write_config(str(folder), sections)
    return folder / "model000010.pt"
