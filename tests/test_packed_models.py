"""Every command that takes a model or a checkpoint takes a packed one."""

import re
import shutil

import pytest
from commands_util import COMMANDS, VARIANTS, arguments, prepare_commands
from conftest import run_script

# slow ones that load as predict.py does, and the one that packs
SKIPPED = ("export_onnx.py", "serve.py", "pack_model.py")
NAMES = re.compile(r"\b(segm|masks)\.pth|\b(diffusion|classifier|super_res|guided)/ema_\S+\.pt")


def lines():
    """(script, flag whose variant it is) of the command lines that name a model."""
    found = [(name, "") for name, line in COMMANDS.items() if NAMES.search(line)]
    for name, flag in (
        ("predict.py", "num_samples"),
        ("image_sample.py", "seg_split"),
        ("baseline_train.py", "feature_blocks"),
        ("prepare_data.py", "k"),
    ):
        line = VARIANTS.get(f"{name} {flag}") or VARIANTS[flag]
        assert NAMES.search(line)
        found.append((name, flag))
    return [one for one in found if one[0] not in SKIPPED]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """The folder of COMMANDS in which packed folders stand in place of model files."""
    folder = prepare_commands(tmp_path_factory.mktemp("workshop"))
    for kind in ("diffusion", "classifier", "super_res", "guided"):
        path = folder / kind / "ema_0.9_000010.pt"
        assert run_script("pack_model.py", path, folder / f"packed_{kind}").code == 0
        shutil.rmtree(folder / kind)
    for kind in ("segm", "masks"):
        path = folder / f"{kind}.pth"
        assert run_script("pack_model.py", path, folder / f"packed_{kind}").code == 0
        path.unlink()
    return folder


@pytest.mark.parametrize(("name", "flag"), lines())
def test_a_packed_model(script, workshop, tmp_path, monkeypatch, name, flag):
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    words = [
        NAMES.sub(lambda m: f"packed_{m[1] or m[2]}", word)
        for word in arguments(name, str(tmp_path / "out"), flag)
    ]
    ended = script(name, *words)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "more",
    ["", "--seg_dir TRAIN/MASK --segmentation_guided True --num_segmentation_classes 3"],
)
def test_a_pretraining_starts_from_a_packed_network(script, workshop, tmp_path, monkeypatch, more):
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    line = f"--data_dir TRAIN/IMG --max_steps 1 {more}"
    line += " --sample_interval 0 --init_checkpoint packed_diffusion"
    ended = script("image_train.py", *line.split())
    assert ended.code == 0, ended.err
