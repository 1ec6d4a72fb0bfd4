"""The arithmetic of --dry_run: what a run takes from what its parts take."""

import dataclasses

import pytest

from guided_diffusion.runtime.command_line.loop_config import LoopConfig
from guided_diffusion.training.estimate import (
    Costs,
    Estimate,
    Images,
    Memory,
    Schedule,
    seconds,
    size,
)

COSTS = Costs(
    start=10.0,
    microbatch=2.0,
    optimizer=1.0,
    reading=0.5,
    checkpoint=3.0,
    grid=20.0,
    checkpoint_bytes=1000,
    grid_bytes=7,
)
IMAGES = Images(per_rank=8, microbatch=2, total=16)


def schedule(images=IMAGES, costs=COSTS, **settings) -> Schedule:
    settings = {"save_interval": 40, "sample_interval": 50, **settings}
    return Schedule(LoopConfig(**settings), images, costs)


def parts(plan: Schedule) -> dict[str, tuple[int, float]]:
    return {part.name: (part.count, part.seconds) for part in plan.parts()}


def test_parts_of_a_run_that_ends():
    plan = schedule(max_steps=100)
    step = 4 * 2.0 + 1.0 + 0.5  # microbatches, optimizer, reading
    assert plan.per_step == step
    assert parts(plan) == {
        "starting": (1, 10.0),
        "steps": (100, 100 * step),
        "checkpoints": (3, 9.0),  # at 40, 80 and at the end
        "sample grids": (2, 40.0),
    }
    assert plan.seconds() == 10 + 950 + 9 + 40


def test_the_last_checkpoint_may_be_that_of_the_interval():
    assert schedule(max_steps=80).checkpoints() == 2
    assert schedule(max_steps=81).checkpoints() == 3
    assert schedule(max_steps=80, save_initial=True).checkpoints() == 3


def test_annealing_ends_a_run_unless_max_steps_does():
    assert schedule(lr_anneal_steps=70).steps == 70
    assert schedule(lr_anneal_steps=70, max_steps=60).steps == 60


def test_the_last_microbatch_may_be_smaller():
    plan = schedule(dataclasses.replace(IMAGES, per_rank=5))
    assert plan.computing == 2.5 * 2.0 + 1.0


def test_cached_images_are_read_once():
    plan = schedule(dataclasses.replace(IMAGES, cached=True, total=20), max_steps=100)
    assert plan.per_step == 9.0
    assert parts(plan)["reading images once"] == (20, 3 * 0.5)
    short = schedule(dataclasses.replace(IMAGES, cached=True, total=80), max_steps=2)
    assert parts(short)["reading images once"] == (16, 2 * 0.5)


def test_processes_read_while_a_step_computes():
    workers = dataclasses.replace(IMAGES, workers=2)
    assert schedule(workers).per_step == 9.0
    slow = dataclasses.replace(COSTS, reading=12.0)
    assert schedule(workers, slow).per_step == 12.0


def test_ranks_share_a_step_and_exchange_once():
    plan = schedule(dataclasses.replace(IMAGES, ranks=4), dataclasses.replace(COSTS, exchange=0.25))
    assert plan.images.per_step == 32
    assert plan.computing == 9.25


def test_disk():
    everything = schedule(max_steps=100)
    assert everything.kept_bytes() == everything.most_bytes() == 3 * 1000 + 2 * 7
    two = schedule(max_steps=100, keep_checkpoints=2)
    assert two.kept_bytes() == 2 * 1000 + 2 * 7
    assert two.most_bytes() == two.kept_bytes() + 1000
    three = schedule(max_steps=100, keep_checkpoints=3)
    assert three.most_bytes() == three.kept_bytes() == everything.kept_bytes()
    assert schedule(max_steps=100, sample_interval=0).kept_bytes() == 3000


def test_checkpoints_by_the_clock_are_counted_but_replaced():
    plan = schedule(max_steps=100, save_minutes=2)  # in 40 steps, 380 s, thrice; in 20, once
    assert parts(plan)["checkpoints"] == (3 + 2 * 3 + 1, 10 * 3.0)
    never = schedule(max_steps=100, save_minutes=0)
    assert parts(never)["checkpoints"] == (3, 9.0)
    assert plan.kept_bytes() == never.kept_bytes() == never.most_bytes()
    assert plan.most_bytes() == plan.kept_bytes() + 1000
    endless = schedule(save_minutes=2)
    assert endless.per_step_with_all == pytest.approx(9.5 + 4 * 3 / 40 + 20 / 50)
    assert "every 40 steps or 2 minutes" in estimate(endless)


def test_a_run_without_an_end():
    plan = schedule()
    assert plan.per_step_with_all == pytest.approx(9.5 + 3 / 40 + 20 / 50)
    steps = 86400 / plan.per_step_with_all
    assert plan.bytes_per_day() == pytest.approx(steps * (1000 / 40 + 7 / 50))
    kept = schedule(keep_checkpoints=1, sample_interval=0)
    assert kept.bytes_per_day() == 0


def estimate(plan: Schedule, **memory) -> str:
    memory = {"peak": 2**30, "available": 2**31, "device": "CPU", **memory}
    return str(Estimate(10**6, 10**12, Memory(**memory), plan))


def test_words():
    said = estimate(schedule(max_steps=100))
    for words in (
        "1.00 million parameters",
        "1.000 teraFLOP per step of 8 images (0.111 teraFLOP/s)",
        "1.00 GiB of memory at the peak, on the CPU",
        "9.500 seconds per step: 4 x 2 s for 2 images, 1 s optimizer, 0.5 s waiting for images",
        "16.8 min for the whole run: starting 10 s, steps 15.8 min (100), checkpoints 9 s (3),",
    ):
        assert words in said
    assert "too little memory" not in said
    endless = estimate(schedule(keep_checkpoints=2))
    assert "361 steps, 2887 images per hour; no end: set --max_steps" in endless
    assert "0.003 MB for 2 and the next" in endless


def test_too_little_memory():
    said = estimate(schedule(), peak=3 * 2**30, sampling=True)
    assert "too little memory here: 2.00 GiB; lower --microbatch" in said
    assert "--sample_interval 0" in said
    workers = dataclasses.replace(COSTS, worker_bytes=2**31)
    assert "too little memory" in estimate(schedule(costs=workers))


def test_units():
    said = [seconds(value) for value in (0.0123, 90, 600, 7200, 7 * 86400)]
    assert said == ["0.0123 s", "90 s", "10 min", "2 hours", "7 days"]
    assert [size(value) for value in (12_300_000, 4_500_000_000)] == ["12.3 MB", "4.5 GB"]
