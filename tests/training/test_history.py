"""What a resumed diffusion run does otherwise is said, logged and recorded, or refused."""

import json
import os
import shlex
import shutil

import numpy as np
import pytest
from conftest import digests
from PIL import Image

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.contents import summary
from guided_diffusion.runtime.storage.resume import Start
from guided_diffusion.training.config import InitTrainConfig, TrainConfig
from guided_diffusion.training.history import Contents, training_sections

TRAINING = shlex.split(
    "--image_size 16 --num_channels 16 --channel_mult 1 --num_res_blocks 1 --num_heads 1"
    " --attention_resolutions 8 --learn_sigma True --noise_schedule cosine --diffusion_steps 50"
    " --batch_size 2 --ema_rate 0.9 --log_interval 1 --save_interval 2 --sample_interval 0"
)


def invert(path) -> None:
    """Other pixels under the same name, of the same size and time."""
    before = path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_other_data_and_another_learning_rate_are_said_logged_and_recorded(
    script, split, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    folder, run = split / "TRAIN" / "IMG", tmp_path / "run"

    def train(*flags: object):
        return script("image_train.py", *TRAINING, *flags)

    assert train("--data_dir", folder, "--lr", 1e-3, "--max_steps", 2).code == 0
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "r1.png").rename(moved / "x.png")
    assert train("--data_dir", moved, "--lr", 1e-3, "--max_steps", 2).code == 0
    assert json.loads((run / "config.json").read_text())["history"] == []
    invert(moved / "r2.png")
    # a complete run learns nothing more, whatever is asked of it
    before = digests(run)
    for flags, said in (((), "training images: 3 in"), (("--lr", 5e-4), "lr 0.0005 instead of")):
        ended = train("--data_dir", moved, "--max_steps", 2, "--lr", 1e-3, *flags)
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
        assert "complete run of 2 steps" in ended.err
        assert said in ended.err
        assert digests(run) == before
    ended = train("--data_dir", moved, "--lr", 5e-4, "--max_steps", 4)
    assert ended.code == 0, ended.err
    config = json.loads((run / "config.json").read_text())
    (entry,) = config["history"]
    assert entry["step"] == 2
    assert entry["changed"][0] == "lr 0.0005 instead of 0.001"
    assert "with other contents" in entry["changed"][1]
    assert entry["data_before"]["contents"] != config["data"]["contents"]
    log = (run / "log.txt").read_text()
    assert "changed at step 2: lr 0.0005 instead of 0.001" in log
    assert train("--data_dir", moved, "--lr", 5e-4, "--max_steps", 4).code == 0
    assert json.loads((run / "config.json").read_text())["history"] == [entry]


def test_a_mask_diffusion_with_corrected_masks_is_refused(script, split, tmp_path):
    folders = [split / part / kind for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK")]

    def train(*flags: object):
        arguments = (*folders, *TRAINING, "--max_steps", 2, "--weights_save", "m.pth")
        return script("mask_diffusion_train.py", *arguments, *flags)

    assert train().code == 0
    mask = split / "TRAIN" / "MASK" / "r1.png"
    content, before = mask.read_bytes(), digests(tmp_path / "m_logs")
    pixels = np.asarray(Image.open(mask))
    Image.fromarray(np.where(pixels > 0, pixels - 1, 0).astype(np.uint8)).save(mask)
    ended = train()
    assert (ended.code, "train: mask of r1 changed" in ended.err) == (2, True), ended.err
    mask.write_bytes(content)
    ended = train("--augmentation", "heavy")
    assert (ended.code, "augmentation 'heavy' instead of" in ended.err) == (2, True), ended.err
    assert digests(tmp_path / "m_logs") == before
    model = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").unlink()  # as if killed between the checkpoint and the model
    assert train().code == 0
    assert (tmp_path / "m.pth").read_bytes() == model


@pytest.mark.parametrize("flag", ["init_checkpoint", "resume_checkpoint"])
def test_a_run_that_began_from_another_checkpoint_is_refused(flag, tmp_path):
    path = tmp_path / "model000010.pt"
    path.write_bytes(b"one")
    train, data = InitTrainConfig(**{flag: str(path)}), Contents("data", 3, "aa")
    run = str(tmp_path / "run")
    sections, _ = training_sections(train, data, Start(), None, run, 1)
    stored = json.loads(json.dumps(sections))
    later = Start(20, f"{run}/model000020.pt")
    assert training_sections(train, data, later, stored, run, 1)[1] == []
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=r"began from .* which has other contents"):
        training_sections(train, data, later, stored, run, 1)


def test_runs_of_older_versions_say_what_is_unknown(tmp_path):
    stored = {"training": {"lr": 1e-4, "batch_size": 4}}
    data = Contents("data", 3, "aa")
    sections, notes = training_sections(TrainConfig(lr=1e-4), data, Start(5, "x"), stored, "run", 2)
    assert len(notes) == 1
    assert "older version" in notes[0]
    assert sections["history"] == []


def test_a_summary_sees_contents_but_no_names(tmp_path):
    big = np.random.default_rng(0).bytes(10**6)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(big)
    paths = [(str(tmp_path / "a"), str(tmp_path / "b"))]
    before = summary(paths)
    (tmp_path / "a").rename(tmp_path / "c")
    paths = [(str(tmp_path / "c"), str(tmp_path / "b"))]
    assert summary(paths) == before
    (tmp_path / "c").write_bytes(big[:-1] + b"x")
    assert summary(paths) != before
