"""A complete training goes on where the same command is given with a greater length."""

import csv
import os

import pytest
import torch as th
from finetuning_util import folders, same, weights

from guided_diffusion.segmentation.training import learning, loop

FLAGS = ("--batch_size", 3, "--image_size", 16, "--augmentation", "light", "--out_channels", 3)


@pytest.fixture
def train(script, pretrained, split):
    def run(*flags: object, name: str = "segm", command: str = "finetune.py"):
        first = [pretrained] if command == "finetune.py" else ["--network", "unet"]
        first += [] if command == "finetune.py" else ["--checkpoint", pretrained]
        saved = ("--weights_save", f"{name}.pth")
        return script(command, *first, *folders(split), *FLAGS, *saved, *flags)

    return run


def steps_of(name: str) -> list[int]:
    with open(f"{name}_logs/progress.csv", newline="") as file:
        return [int(float(row["step"])) for row in csv.DictReader(file)]


@pytest.mark.parametrize("command", ["finetune.py", "baseline_train.py"])
def test_a_longer_run_goes_on_as_if_it_had_been_so_from_the_start(train, command, monkeypatch):
    monkeypatch.setattr(learning, "_MOST_EPOCHS", 2)
    constant = ("--schedule", "constant")
    assert train(*constant, "--steps", 4, command=command).code == 0
    ended = train(*constant, "--steps", 8, command=command)
    assert ended.code == 0, ended.err
    assert "extended from 4 to 8 steps, now at step 4" in ended.err
    assert train(*constant, "--steps", 8, name="whole", command=command).code == 0
    assert same(weights("segm_last.pth"), weights("whole_last.pth"))
    assert steps_of("segm") == [2, 4, 8]  # an epoch of the longer run has 4 steps
    assert "complete" in train(*constant, "--steps", 8, command=command).out
    before = th.load("segm_last.pth")
    assert before["origin"]["extended"] == [4]
    for shorter in (("--steps", 4), ("--epochs", 2)):
        ended = train(*constant, *shorter, command=command)
        assert (ended.code, "belongs to another run" in ended.err) == (2, True), ended.err
    assert "complete" in train(*constant, "--steps", 0, "--epochs", 8, command=command).out


def test_the_rate_follows_the_longer_schedule_and_kills_change_nothing(train, monkeypatch):
    def extend(name):
        return train("--epochs", 6, "--lr", 1e-3, "--warmup", 0, name=name)

    for name in ("segm", "killed"):
        assert train("--epochs", 2, "--lr", 1e-3, "--warmup", 0, name=name).code == 0
    ended = extend("segm")
    assert ended.code == 0, ended.err
    assert "from here on, 0.00075 instead of 0" in ended.err
    save = loop.Finetuner.save
    with monkeypatch.context() as patch:

        def save_and_crash(self) -> None:
            save(self)
            raise KeyboardInterrupt

        patch.setattr(loop, "SAVE_EVERY", -1.0)
        patch.setattr(loop.Finetuner, "save", save_and_crash)
        assert extend("killed").code == 130
    ended = extend("killed")
    assert (ended.code, "extended" in ended.err) == (0, False), ended.err
    assert same(weights("segm_last.pth"), weights("killed_last.pth"))
    assert same(weights("segm.pth"), weights("killed.pth"))
    assert th.load("killed_last.pth")["origin"]["extended"] == [2]


def test_self_training_extends_its_student_alone(train, split):
    few = ("--teachers", 1, "--unlabeled_images", 2, "--confidence", 0, "--drop_uncertain", 0)
    flags = ("--unlabeled_dir", split / "VAL/IMG", *few, "--rounds", 2)
    ended = train(*flags, "--steps", 1)
    assert ended.code == 0, ended.err
    stages = ("teacher_1.pth", "student_1.pth", "labels_2.pt")
    kept = {name: os.stat(f"segm_logs/stages/{name}").st_mtime_ns for name in stages}
    done = th.load("segm_last.pth")["stepper"]["steps"]
    ended = train(*flags, "--steps", 3)
    assert ended.code == 0, ended.err
    assert th.load("segm_last.pth")["stepper"]["steps"] == 3 * done
    assert {n: os.stat(f"segm_logs/stages/{n}").st_mtime_ns for n in stages} == kept
    assert "complete" in train(*flags, "--steps", 3).out


def test_a_mask_diffusion_goes_on_with_more_steps(script, split, tmp_path):
    line = "--image_size 16 --num_channels 16 --channel_mult 1 --num_res_blocks 1 --num_heads 1"
    line += " --diffusion_steps 20 --sample_interval 0 --batch_size 2 --weights_save m.pth"

    def run(steps: int, *more: object):
        flags = (*line.split(), "--lr_anneal_steps", steps, *more)
        return script("mask_diffusion_train.py", *folders(split), *flags)

    assert run(1).code == 0
    ended = run(2)
    assert ended.code == 0, ended.err
    assert "changed at step 1: lr_anneal_steps 2 instead of 1" in ended.err
    assert th.load("m.pth")["step"] == 2
    ended = run(3, "--lr", 0.5)
    assert (ended.code, "lr 0.5 instead of" in ended.err) == (2, True), ended.err
    assert "lr_anneal_steps" not in ended.err
