"""`--dry_run` and `--compile` of image_train.py."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th
from conftest import TINY, draw_pairs
from paths import ROOT

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.kernels import library as kernels
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.operations import count_operations
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.training import dry_run
from guided_diffusion.training.config import GuidedTrainConfig
from guided_diffusion.training.pieces import Piece
from guided_diffusion.training.trial import Trial
from guided_diffusion.unet import UNetModel

FLAGS = """
    --image_size 16 --num_channels 32 --num_res_blocks 1 --num_head_channels 16 --channel_mult 1,2
    --attention_resolutions 8 --learn_sigma True --resblock_updown True --diffusion_steps 50
""".split()  # noqa: SIM905 - as on a command line


@pytest.mark.parametrize("more", [[], ["--microbatch", "2"], ["--class_cond", "True"]])
def test_dry_run_tells_and_writes_nothing(script, tmp_path, more):
    draw_pairs(tmp_path / "data", 4)
    before = sorted(tmp_path.rglob("*"))
    data = ["--data_dir", tmp_path / "data" / "IMG", "--batch_size", "4", "--dry_run", "True"]
    ended = script("image_train.py", *FLAGS, *data, *more)
    assert ended.code == 0, ended.err
    assert sorted(tmp_path.rglob("*")) == before
    if "--class_cond" not in more:
        count = sum(p.numel() for p in TINY.build().parameters())
        assert f"{count / 1e6:.2f} million parameters" in ended.out
    for unit in ("teraFLOP per step of 4 images", "GiB of memory", "seconds per step", "on disk"):
        assert unit in ended.out


def test_it_refuses_what_the_run_would_refuse(script, tmp_path):
    draw_pairs(tmp_path / "data", 2)
    data = ["--data_dir", tmp_path / "data" / "IMG", "--batch_size", "4"]
    (tmp_path / "file").write_text("in the way")
    errors = []
    for more in (["--max_steps", "1"], ["--dry_run"]):
        ended = script("image_train.py", *FLAGS, *data, *more)
        assert ended.code == 2
        errors.append(ended.err)
    assert "fewer than the 4 of one step" in errors[0]
    assert "fewer than the 4 of one step" in errors[1]


def test_it_refuses_a_folder_that_cannot_be_written(script, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "file" / "run"))
    ended = script("image_train.py", *FLAGS, "--dry_run")
    assert ended.code == 2
    assert str(tmp_path / "file") in ended.err


def test_the_global_batch_counts(script):
    ended = script("image_train.py", *FLAGS, "--global_batch_size", "3", "--dry_run")
    assert ended.code == 0, ended.err
    assert "per step of 3 images" in ended.out


def test_trainers_that_cannot_refuse_it(script):
    for name in ("super_res_train.py", "classifier_train.py"):
        ended = script(name, "--dry_run")
        assert ended.code == 2
        assert "--dry_run" in ended.err


def test_guided(script):
    flags = ["--segmentation_guided", "True", "--num_segmentation_classes", "3", "--dry_run"]
    ended = script("image_train.py", *FLAGS, *flags)
    assert ended.code == 0, ended.err
    assert re.search(r"[\d.]+ seconds per step", ended.out)


def test_guided_with_masks(script, tmp_path):
    draw_pairs(tmp_path / "data", 4)
    flags = ["--segmentation_guided", "True", "--num_segmentation_classes", "3", "--dry_run"]
    data = ["--data_dir", tmp_path / "data" / "IMG", "--seg_dir", tmp_path / "data" / "MASK"]
    more = ["--batch_size", "2", "--num_workers", "1"]
    ended = script("image_train.py", *FLAGS, *flags, *data, *more)
    assert ended.code == 0, ended.err
    assert "more in the data loader processes" in ended.out


def test_pieces_stand_for_a_network_that_is_too_slow(script, monkeypatch):
    monkeypatch.setattr(dry_run, "_LONGEST_STEP", 0.0)
    monkeypatch.setattr(dry_run, "_LONGEST_SAMPLE", 0.0)
    ended = script("image_train.py", *FLAGS, "--image_size", "64", "--dry_run", "--batch_size", "4")
    assert ended.code == 0, ended.err
    said = "a microbatch of 1 at 4x4 pixels, scaled by operations to 4 at 64x64 pixels"
    assert said in ended.out
    assert "counted, not run" in ended.out


def trial(*flags: str, model_type=ModelConfig) -> Trial:
    parser = make_parser("", GuidedTrainConfig, GuidedConfig, DiffusionConfig, ReadingConfig)
    run, _ = dry_run._describe(parse_flags(parser, [*FLAGS, *flags]), model_type)
    return Trial(run, time.perf_counter)


def test_operations_are_those_of_the_whole_network():
    bench = trial()
    one = bench.operations(Piece(1, 16), backward=False)
    assert bench.operations(Piece(3, 16), backward=False) == 3 * one
    x = th.zeros(1, 1, 16, 16)
    assert one == count_operations(lambda: bench.loop.model.to("meta")(x.to("meta"), th.zeros(1)))
    # of larger images in the same network: that of the larger size, with attention as deep
    large = trial("--image_size", "32", "--attention_resolutions", "16")
    whole = Piece(1, 32)
    assert bench.operations(whole, True) == large.operations(whole, True)
    assert bench.operations(whole, True) > 4 * bench.operations(Piece(1, 16), True)


def test_evaluations_and_size_of_a_grid(script, tmp_path, monkeypatch):
    """Those of the grid that a run draws."""
    draw_pairs(tmp_path / "data", 4)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
    calls = []
    forward = UNetModel.forward

    def counted(network, x, *arguments, **named):
        if not network.training:
            calls.append(x.shape)
        return forward(network, x, *arguments, **named)

    monkeypatch.setattr(UNetModel, "forward", counted)
    data = ["--data_dir", tmp_path / "data" / "IMG", "--batch_size", "4"]
    more = ["--max_steps", "1", "--sample_interval", "1"]
    ended = script("image_train.py", *FLAGS, *data, *more)
    assert ended.code == 0, ended.err
    of_the_run = list(calls)  # before those of the trial
    bench = trial()
    assert of_the_run == [(16, 1, 16, 16)] * bench.evaluations()
    assert bench.grid == (16, 16)
    drawn = (tmp_path / "run" / "samples_000001.png").stat().st_size
    assert bench.grid_bytes() == pytest.approx(drawn, rel=0.2)


MEASURE = """
import json, sys
sys.path.insert(0, {benchmarks!r})
from dry_run import run_one
print(json.dumps(run_one({kind!r}, "cpu", {flags!r})))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by /proc")
def test_memory_and_checkpoints_are_those_of_a_run(tmp_path):
    """In processes of their own, since a peak is of all that a process has done."""
    draw_pairs(tmp_path / "data", 24, size=(64, 64))
    flags = [*FLAGS, "--data_dir", str(tmp_path / "data" / "IMG"), "--image_size", "64"]
    flags += ["--batch_size", "24", "--microbatch", "12", "--ema_rate", "0.9,0.99"]
    flags += ["--max_steps", "2", "--save_interval", "1", "--sample_interval", "2"]
    flags += ["--timestep_respacing", "2"]  # of a grid too

    def measured(kind: str) -> dict[str, float]:
        env = {
            **os.environ,
            "OPENAI_LOGDIR": str(tmp_path / kind),
            "GUIDED_DIFFUSION_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        code = MEASURE.format(benchmarks=str(ROOT / "benchmarks"), kind=kind, flags=flags)
        ended = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    predicted, real = measured("predicted"), measured("real")
    assert not (tmp_path / "predicted").exists()
    assert predicted["GiB"] == pytest.approx(real["GiB"], rel=0.2)
    assert predicted["MB saved"] == pytest.approx(real["MB saved"], rel=0.02)


def test_counted_memory_agrees_with_what_a_run_takes(tmp_path):
    """The growth of a process that trains on many images, over one that trains on few.

    Every tensor has pages of its own there: the gaps of a heap differ from run to run.
    """
    code = """
import sys
sys.path.insert(0, {tests!r})
from training.test_dry_run import trial
from guided_diffusion.training.pieces import Piece
from guided_diffusion.training.trial import peak_memory
bench = trial("--image_size", "64", "--batch_size", "48")
few, many = Piece(4, 64), Piece(48, 64)
bench.train(few); bench.update(); before = peak_memory()
bench.train(many)
grown = peak_memory() - before
counted = bench.counted(many, few).training - bench.counted(few, few).training
print(counted / grown)
"""
    env = {**os.environ, "GUIDED_DIFFUSION_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    env["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    env["PYTHONPATH"] = str(ROOT)
    ended = subprocess.run(
        [sys.executable, "-c", code.format(tests=str(ROOT / "tests"))],
        env=env,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert 0.75 < float(ended.stdout.split()[-1]) < 1.2


def test_the_network_is_one_graph(monkeypatch):
    """Without breaks, whatever compiles it, with recomputed activations as well."""
    monkeypatch.setattr(kernels, "library", lambda: None)  # torch traces its own operations
    for recompute in (False, True, "norms"):
        model = TINY.build()
        for module in model.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = recompute
        x, steps = th.randn(2, 1, 16, 16), th.tensor([3, 40])
        th.nn.init.normal_(model.out[-1].weight)
        expected = model(x, steps)
        names = list(model.state_dict())
        model.compile(fullgraph=True, backend="eager")
        th.testing.assert_close(model(x, steps), expected)
        model(x, steps).mean().backward()
        assert list(model.state_dict()) == names
