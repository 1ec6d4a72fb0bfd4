"""Weights & Biases as one more place to log to; the package itself is a fake."""

import builtins
import sys
import types

import pytest
from sampling_util import write_shapes

from guided_diffusion import logger
from guided_diffusion.runtime.errors import UserError

TRAIN = (
    *("--image_size", 16, "--num_channels", 32, "--num_res_blocks", 1, "--channel_mult", "1,2"),
    *("--batch_size", 2, "--ema_rate", "0.9", "--log_interval", 1, "--sample_interval", 0),
)


class Fake(types.ModuleType):
    """The few names of wandb that are used, keeping what they were called with."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **settings):
        run = types.SimpleNamespace(settings=settings, rows=[], finished=False)
        run.log = lambda row, step: run.rows.append((step, row))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_and_its_continuation_are_one(script, wandb, monkeypatch, tmp_path):
    data = write_shapes(tmp_path / "data", count=4)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "my_run"))
    for most in (2, 3):
        flags = ("--data_dir", data, *TRAIN, "--max_steps", most, "--wandb")
        done = script("image_train.py", *flags)
        assert done.code == 0, done.err
    first, second = wandb.runs
    assert first.settings == second.settings
    assert first.settings["name"] == "my_run"
    assert first.settings["resume"] == "allow"
    assert [step for step, _ in first.rows + second.rows] == [1, 2, 3]
    assert all(isinstance(row["loss"], float) for _, row in first.rows)
    assert first.finished
    assert (tmp_path / "my_run" / "progress.csv").exists()  # besides, not instead


def test_fine_tuning(script, wandb, pretrained, split):
    folders = [split / "TRAIN" / kind for kind in ("IMG", "MASK")]
    done = script("finetune.py", pretrained, *folders, "--epochs", 2, "--wandb", "True")
    assert done.code == 0, done.err
    (run,) = wandb.runs
    assert [row["epoch"] for _, row in run.rows] == [1, 2]
    assert run.finished
    assert "ignored here" not in done.out


def test_other_folders_are_other_runs(wandb, tmp_path):
    for name in ("a", "b"):
        logger.configure(str(tmp_path / name), ["wandb"])
    logger.reset()
    assert len({run.settings["id"] for run in wandb.runs}) == 2


def test_it_is_not_imported_unless_asked_for(script, wandb, monkeypatch, tmp_path):
    data = write_shapes(tmp_path / "data", count=4)
    done = script("image_train.py", "--data_dir", data, *TRAIN, "--max_steps", 1)
    assert done.code == 0, done.err
    assert not wandb.runs


def test_without_the_package_one_line_says_so(script, monkeypatch, tmp_path):
    data = write_shapes(tmp_path / "data", count=4)
    usual = builtins.__import__

    def without(name, *rest):
        if name == "wandb":
            raise ImportError(name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    done = script("image_train.py", "--data_dir", data, *TRAIN, "--max_steps", 1, "--wandb", "True")
    assert done.code == 2
    assert "--wandb: the package wandb is not installed: pip install wandb" in done.err


def test_what_it_refuses_is_said(wandb, monkeypatch, tmp_path):
    def init(**_):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match="--wandb: no API key configured: log in"):
        logger.configure(str(tmp_path), also=["wandb"])
    logger.reset()
