"""Training by several processes: what comes out is what one process computes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from alignment_util import use_tiny_encoder
from conftest import draw_pairs
from PIL import Image
from process_util import (
    LAUNCHERS,
    LONGEST_S,
    ROOT,
    Command,
    free_port,
    mpiexec,
    torchrun_environments,
)

from guided_diffusion.runtime.storage import checkpoint

# Channels: see WIDE in loop_util. The learning rate is the default. The bounds below are float32's.
FLAGS = """
    --image_size 8 --num_channels 64 --channel_mult 1 --num_res_blocks 1 --num_head_channels 32
    --attention_resolutions 8 --learn_sigma True --noise_schedule cosine --diffusion_steps 20
    --global_batch_size 4 --max_steps 20 --save_interval 10 --log_interval 5 --sample_interval 0
    --ema_rate 0.9 --weight_decay 0.01 --lr 1e-4 --precision fp32
""".split()  # noqa: SIM905 - as on a command line


def draw_images(folder: Path, count: int = 10) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.kron(rng.integers(0, 256, (4, 4)), np.ones((2, 2)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images") / "png")


def flags(images, *more) -> list[str]:
    return [*FLAGS, "--data_dir", str(images), *map(str, more)]


def train(folder, arguments, num_ranks: int = 1, before=None, **env) -> list[Command]:
    """Start image_train.py on some ranks."""
    environments = torchrun_environments(num_ranks) if num_ranks > 1 else [{}]
    return [
        Command(
            "image_train.py",
            arguments,
            {"OPENAI_LOGDIR": str(folder), **own, **env},
            folder.with_name(f"{folder.name}_said_{rank}.txt"),
            before,
        )
        for rank, own in enumerate(environments)
    ]


def finish(commands: list[Command]) -> None:
    for command in commands:
        assert command.wait() == 0, command.said


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """One process, with microbatches of 3 and 1."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(train(folder, flags(images, "--microbatch", 3)))
    return folder


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def assert_close_weights(ours: th.Tensor, theirs: th.Tensor, name: str) -> None:
    """AdamW divides a gradient by its own size, so where it is all but zero, its rounding, which
    differs between processors, shows in the weight: in a few of them, and by a fraction of a step.
    """
    difference = (ours - theirs).abs()
    assert (difference > 1e-6).double().mean() < 1e-4, name
    assert difference.max() < 1e-5, name  # a tenth of a step at this learning rate


def assert_same_run(ours, theirs) -> None:
    for name in ("model000010.pt", "model000020.pt", "ema_0.9_000020.pt"):
        one, other = (checkpoint.load(str(folder / name)) for folder in (ours, theirs))
        assert list(one) == list(other)
        for key in one:
            assert_close_weights(one[key], other[key], f"{name} {key}")
    assert len(rows(ours)) == len(rows(theirs)) == 4
    for one, other in zip(rows(ours), rows(theirs)):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds_per_step", "images_per_second"}:
            if one[key] or other[key]:
                assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-5), key


def launched(launcher: list[str], folder, arguments) -> subprocess.CompletedProcess:
    """image_train.py under a real launcher."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return subprocess.run(
        [*launcher, str(ROOT / "scripts" / "image_train.py"), *arguments],
        env=env
        | {
            "OPENAI_LOGDIR": str(folder),
            "OPENAI_LOG_FORMAT": "log,csv",
            "OMP_NUM_THREADS": "1",
            "GUIDED_DIFFUSION_DEVICE": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )


class TestTwoRanksAreOneProcess:
    """20 steps of two ranks with a batch of 2 each, one by one, and of one with a batch of 4."""

    def test_under_torchrun(self, images, alone, tmp_path):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        torchrun += ["--master-port", str(free_port())]
        ended = launched(torchrun, tmp_path / "run", flags(images, "--microbatch", 1))
        assert ended.returncode == 0, ended.stderr
        assert_same_run(tmp_path / "run", alone)
        # each rank has a log, rank 0 alone speaks
        assert {path.name for path in (tmp_path / "run").glob("*[a-z0-9].txt")} == {
            "log.txt",
            "log-rank001.txt",
        }
        assert ended.stderr.count("device: cpu") == ended.stderr.count("; 2 ranks") == 1
        assert ended.stdout == f"run folder: {tmp_path / 'run'}\n"
        assert "Warning" not in ended.stderr

    def test_under_mpiexec(self, images, alone, tmp_path):
        ended = launched(mpiexec(), tmp_path / "run", flags(images, "--microbatch", 1))
        if "mpi4py does not work" in ended.stderr or "use the mpiexec of that" in ended.stderr:
            pytest.skip("mpi4py and mpiexec do not fit together")
        assert ended.returncode == 0, ended.stderr
        assert_same_run(tmp_path / "run", alone)

    def test_by_turns(self, images, alone, tmp_path):
        """The number of ranks may change at a restart."""
        folder = tmp_path / "run"
        finish(train(folder, [*flags(images), "--max_steps", "7"], 2))
        finish(train(folder, [*flags(images), "--max_steps", "13"]))
        finish(train(folder, flags(images), 2))
        assert_same_run(folder, alone)

    def test_timesteps_by_loss(self, images, tmp_path):
        """What the sampler learns from the losses of all ranks decides the timesteps of all."""
        more = ["--schedule_sampler", "loss-second-moment", "--diffusion_steps", "2"]
        weights = []
        for ranks in (1, 2):
            folder = tmp_path / str(ranks)
            finish(train(folder, flags(images, *more), ranks))
            weights.append(checkpoint.load(str(folder / "model000020.pt")))
            state = checkpoint.load(str(folder / "state000020.pt"))["sampler"]
            assert (state["seen"] > 10).all()
        for key in weights[0]:
            th.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=1e-6)


def test_rank_0_probes_while_others_go_on(images, alone, tmp_path):
    draw_pairs(tmp_path / "Split" / "TRAIN", 2)
    draw_pairs(tmp_path / "Split" / "VAL", 1, seed=1)
    probe = ("--probe_dir", tmp_path / "Split", "--probe_interval", 10)
    finish(train(tmp_path / "run", flags(images, *probe), 2))
    points = json.loads((tmp_path / "run" / "probe.json").read_text())["points"]
    assert [point["step"] for point in points] == [10, 20]
    found = [(row["step"], row["probe_dice"]) for row in rows(tmp_path / "run")]
    assert found == [
        ("5", ""),
        ("10", str(points[0]["dice"])),
        ("15", ""),
        ("20", str(points[1]["dice"])),
    ]
    one, other = (checkpoint.load(str(run / "model000020.pt")) for run in (tmp_path / "run", alone))
    for key in one:
        th.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


def test_labelled_images_that_cannot_be_used_stop_all_ranks(images, tmp_path):
    commands = train(tmp_path / "run", flags(images, "--probe_dir", tmp_path), 2)
    assert [command.wait() for command in commands] == [2, 2]
    said = "".join(command.said for command in commands)
    assert said.count("error: ") == 1
    assert "TRAIN/IMG is missing" in said


def test_heads_of_an_alignment_are_those_of_one_process(images, tmp_path):
    """Two ranks, one process in microbatches, and both by turns."""
    aligned = [*flags(images), "--align_encoder", "efficientnet-lite0"]
    folders = [tmp_path / name for name in ("one", "two", "turns")]
    finish(train(folders[0], [*aligned, "--microbatch", "3"], 1, use_tiny_encoder))
    finish(train(folders[1], aligned, 2, use_tiny_encoder))
    finish(train(folders[2], [*aligned, "--max_steps", "7"], 2, use_tiny_encoder))
    finish(train(folders[2], aligned, 1, use_tiny_encoder))
    one, *others = (
        checkpoint.load(str(folder / "state000020.pt"))["stepper"]["beside"] for folder in folders
    )
    for folder, other in zip(folders[1:], others):
        assert_same_run(folder, folders[0])
        assert list(other) == list(one)
        for name, saved in one.items():
            th.testing.assert_close(other[name]["weight"], saved["weight"], rtol=0, atol=1e-6)


def spoil_rank_1() -> None:
    """In the ranks, before they start: rank 1 sees a pixel that is not a number from step 5 on."""
    from guided_diffusion import dist_util
    from guided_diffusion.train_util import TrainLoop

    step = TrainLoop.run_step

    def spoilt(self, batch, cond):
        if self.step >= 5 and dist_util.rank() == 1:
            batch[0, 0, 0, 0] = float("nan")
        step(self, batch, cond)

    TrainLoop.run_step = spoilt


class TestErrors:
    def test_what_is_not_finite_on_one_rank_stops_all(self, images, tmp_path):
        folder = tmp_path / "run"
        more = ["--max_skipped_steps", "2", "--save_interval", "3"]
        commands = train(folder, flags(images, *more), 2, spoil_rank_1)
        assert [command.wait() for command in commands] == [2, 2]
        (line,) = [
            line
            for command in commands
            for line in command.said.splitlines()
            if line.startswith("error: ")
        ]
        assert line.startswith("error: no finite gradient in 2 steps in a row, since step 5: loss ")
        assert "layer input_blocks.0.0 is the first whose output is not finite" in line
        assert "last good checkpoint is at step 6" in line
        saved = checkpoint.load(str(folder / "model000006.pt"))
        assert all(th.isfinite(value).all() for value in saved.values())

    def test_too_few_images(self, images, tmp_path):
        few = draw_images(tmp_path / "few", 3)
        commands = train(tmp_path / "run", flags(few), 2)
        assert [command.wait() for command in commands] == [2, 2]
        said = "".join(command.said for command in commands)
        assert said.count("error: ") == 1
        assert "holds 3 images, fewer than the 4 of one step: lower --batch_size" in said

    def test_a_batch_that_cannot_be_shared_out(self, images, tmp_path):
        commands = train(tmp_path / "run", flags(images, "--global_batch_size", "5"), 2)
        assert [command.wait() for command in commands] == [2, 2]
        said = "".join(command.said for command in commands)
        assert "error: --global_batch_size 5 is not divisible by 2 ranks" in said
