"""Runs whose folder nobody named say where they are, and name the one that was left."""

import os
import re
import shlex
import signal
from datetime import datetime
from pathlib import Path

import pytest
from conftest import run_script
from sampling_util import write_shapes

from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import run as training_run

FLAGS = shlex.split(
    "--image_size 16 --num_channels 16 --channel_mult 1 --num_res_blocks 1 --num_heads 1"
    " --attention_resolutions 8 --batch_size 2 --sample_interval 0 --save_interval 1 --max_steps 4"
)


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """Run the command as the N-th of a day; a text that it logs is in "out" or "err"."""
    images = write_shapes(tmp_path / "images", 4)

    def run(number: int, *more: object, stop: bool = False) -> tuple[int, str]:
        class Clock(datetime):
            @classmethod
            def now(cls):
                return cls(2026, 1, 1, number)

        with monkeypatch.context() as patch:
            patch.setattr(training_run, "datetime", Clock)
            if stop:
                step = TrainLoop.run_step
                patch.setattr(TrainLoop, "run_step", lambda *a: (step(*a), _interrupt()))
            ended = script("image_train.py", "--data_dir", images, *FLAGS, *more)
        return ended.code, ended.out + ended.err

    return run


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_command_that_resumes_is_logged_and_resumes(train):
    code, said = train(1, stop=True)
    assert code == EXIT_STOPPED, said
    first = "runs/20260101-010000"
    how = re.search(r"begins anew; to resume: python (.* --output (\S+))", said)
    assert how[2] == first
    assert "unfinished" not in said

    assert "unfinished" not in train(2, "--max_steps", 2)[1]  # it has done as many already
    code, said = train(3, stop=True)
    found = re.search(r"(\S+) holds an unfinished run .* step 2: .* --output (\S+)", said)
    assert found.groups() == ("runs/20260101-020000",) * 2
    assert train(4)[0] == 0
    # the newest of the same is complete by now
    assert "unfinished" not in train(5)[1]

    script, *flags = shlex.split(how[1])
    ended = run_script(Path(script).name, *flags)
    assert ended.code == 0, ended.err
    assert "at step 2" in ended.out + ended.err
    assert "no run folder was named" not in ended.out + ended.err


@pytest.mark.parametrize(
    "other", [("--lr", 0.5), ("--resize", "pad"), ("--noise_schedule", "cosine"), ("--seed", 3)]
)
def test_another_run_is_not_named(train, other):
    assert train(1, stop=True)[0] == EXIT_STOPPED
    assert "unfinished" not in train(2, *other, "--max_steps", 1)[1]


def test_other_images_are_not_named(train, tmp_path):
    assert train(1, stop=True)[0] == EXIT_STOPPED
    next((tmp_path / "images").iterdir()).unlink()
    code, said = train(2)
    assert (code, "unfinished" in said) == (0, False), said
