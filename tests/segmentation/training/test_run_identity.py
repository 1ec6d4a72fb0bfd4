"""A run is known by the contents that it learnt from, not by names: fine-tuning and baselines."""

import contextlib
import os
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch as th
from conftest import digests, draw_pairs
from PIL import Image

from guided_diffusion.segmentation.training import loop

PARTS = ("TRAIN", "VAL")
TRAINING = ("--out_channels", 3, "--epochs", 1, "--batch_size", 3, "--augmentation", "light")


def paths(split) -> list:
    return [split / part / kind for part in PARTS for kind in ("IMG", "MASK")]


def change(path, by: int = 1) -> None:
    """Other pixels under the same name and of the same time."""
    before = path.stat()
    pixels = np.asarray(Image.open(path))
    Image.fromarray(np.where(pixels > 0, pixels - by, 0).astype(pixels.dtype)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_weights(path) -> None:
    th.save({name: value + 0.01 for name, value in th.load(path).items()}, path)


@contextlib.contextmanager
def kept(*files):
    """Give the files back what they held."""
    before = {path: path.read_bytes() if path.exists() else None for path in files}
    yield
    for path, content in before.items():
        path.unlink() if content is None else path.write_bytes(content)


def rename_all(split) -> None:
    """Other names, in the reverse order, and other times."""
    for folder in paths(split):
        for path in sorted(folder.iterdir()):
            os.utime(path, (time.time() + 99, time.time() + 99))
            path.rename(path.with_name(f"x{9 - int(path.stem[1])}.png"))


def check_refused(run, folder, *words: str) -> None:
    before = digests(folder)
    ended = run()
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1
    assert "complete" not in ended.out
    for word in (*words, "--resume_checkpoint none"):
        assert word in ended.err
    assert digests(folder) == before


@pytest.mark.parametrize("command", ["finetune.py", "baseline_train.py"])
def test_a_run_is_complete_for_its_own_contents_alone(command, script, pretrained, split, tmp_path):
    first = [pretrained] if command == "finetune.py" else []
    flags = (
        []
        if first
        else ["--network", "features", "--feature_blocks", "1,2", "--checkpoint", pretrained]
    )

    def train(*more: object):
        return script(command, *first, *paths(split), *flags, *TRAINING, *more)

    assert train().code == 0
    assert "complete" in train().out
    (image, mask), (val, _) = ([split / p / k / "r1.png" for k in ("IMG", "MASK")] for p in PARTS)
    with kept(mask):
        change(mask)
        check_refused(train, tmp_path, "train: mask of r1 changed", "another --weights_save")
    with kept(image, val):
        change(image, 9)
        change(val, 9)
        check_refused(train, tmp_path, "train: image r1 changed", "val: image r1 changed")
    further = [split / "TRAIN" / kind / "r9.png" for kind in ("IMG", "MASK")]
    with kept(*further):
        for path in further:
            shutil.copy(path.with_name("r1.png"), path)
        change(further[0], 5)
        check_refused(train, tmp_path, "train: r9 new")
    with kept(pretrained):
        change_weights(pretrained)
        check_refused(train, tmp_path, f"checkpoint: {pretrained.name} changed")
    other = partial(train, "--seed", 7, "--lr", 0.5)
    check_refused(other, tmp_path, "seed 7 instead of 0", "lr 0.5 instead of")
    with kept(tmp_path / "segm.pth"):
        (tmp_path / "segm.pth").unlink()
        check_refused(train, tmp_path, "segm.pth is missing")
    rename_all(split)
    before = digests(tmp_path)
    ended = train()
    assert (ended.code, ended.out.strip()) == (0, "this run is complete: nothing to do"), ended.err
    assert digests(tmp_path) == before
    change(split / "TRAIN" / "MASK" / "x8.png")
    assert train("--resume_checkpoint", "none").code == 0
    assert (tmp_path / "segm.pth.old").exists()
    assert "complete" in train().out


def test_a_stopped_run_resumes_with_renamed_files_as_if_they_were_not(
    script, pretrained, split, tmp_path, monkeypatch
):
    def run(weights: str):
        flags = (*TRAINING, "--epochs", 3, "--batch_size", 1, "--weights_save", weights)
        return script("finetune.py", pretrained, *paths(split), *flags)

    assert run("whole.pth").code == 0
    save = loop.Finetuner.save
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)

    def save_and_crash(self) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Finetuner, "save", save_and_crash)
        assert run("renamed.pth").code == 130
    rename_all(split)
    ended = run("renamed.pth")
    assert ended.code == 0, ended.err
    one, other = (th.load(f"{n}_last.pth")["state_dict"] for n in ("whole", "renamed"))
    assert all(th.equal(one[name], other[name]) for name in one)


def test_synthetic_pairs_count(script, pretrained, split, tmp_path):
    draw_pairs(tmp_path / "more", 2, seed=5)
    flags = (*TRAINING, "--synthetic_dir", tmp_path / "more")

    def run():
        return script("finetune.py", pretrained, *paths(split), *flags)

    assert run().code == 0
    assert "complete" in run().out
    change(tmp_path / "more" / "IMG" / "r1.png", 9)
    check_refused(run, tmp_path, "synthetic: image r1 changed")


def test_class_names_count(script, pretrained, split, tmp_path):
    table = tmp_path / "classes.json"
    names = ["background", "enamel", "dentin"]

    def run():
        rows = ", ".join(
            f'{{"index": {i}, "name": "{name}", "color": [{i}, 0, 0]}}'
            for i, name in enumerate(names)
        )
        table.write_text(f"[{rows}]")
        return script("finetune.py", pretrained, *paths(split), *TRAINING, "--categories", table)

    ended = run()
    assert ended.code == 0, ended.err
    names[2] = "pulp"
    ended = run()
    assert ended.code == 2
    assert "categories" in ended.err
