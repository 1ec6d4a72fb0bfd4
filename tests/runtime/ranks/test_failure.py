"""guided_diffusion.runtime.ranks.failure: which of the ranks has failed, in one line."""

import dataclasses
import os
import signal
import sys
import time

import pytest
import torch as th
import torch.distributed as dist
from process_util import HOST
from ranks_util import HANGS_S, run_ranks

from guided_diffusion import dist_util
from guided_diffusion.runtime import errors
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.ranks import failure
from guided_diffusion.runtime.signals import EXIT_STOPPED


def fail(action):
    """Ranks that do small collective calls until rank 1, or all, take `action`."""
    with dist_util.failure_guard():
        dist_util.setup_dist()
        tensor = th.ones(1)
        for step in range(100_000):
            if step == 5:
                action(dist_util.rank())
            dist.all_reduce(tensor)


def on_rank_1(rank):
    if rank == 1:
        raise UserError("img_3.png\nis broken")


def on_all_ranks(rank):
    raise UserError("no such folder")


def on_rank_1_a_bug(rank):
    if rank == 1:
        raise KeyError("x")


def kill_rank_0(rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_rank_1(rank):
    if rank == 1:
        if os.fork() == 0:  # like a data loader's worker, which outlives its parent for a while
            while not os.path.exists(os.environ["TEST_DONE"]):
                time.sleep(0.1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def freeze_rank_1(rank):
    if rank == 1:
        time.sleep(2 * HANGS_S)


def interrupt_all(rank):
    raise KeyboardInterrupt


def stop_all(rank):
    sys.exit(EXIT_STOPPED)


def leave_rank_1(rank):
    if rank == 1:
        sys.exit(3)


@dataclasses.dataclass(frozen=True)
class Fail:
    action: object

    def __call__(self):
        errors.command(self.main)()

    def main(self):
        fail(self.action)


@pytest.mark.parametrize(
    ("action", "codes", "lines"),
    [
        (on_rank_1, (2, 2), [f"error: rank 1 ({HOST}): img_3.png is broken"]),
        (on_all_ranks, (2, 2), ["error: no such folder"]),
        (on_rank_1_a_bug, (1, 1), [f"error: rank 1 ({HOST}): KeyError: 'x'"]),
        (kill_rank_0, (-9, 1), [f"error: rank 0 ({HOST}): {failure.DIED}"]),
        (kill_rank_1, (1, -9), [f"error: rank 1 ({HOST}): {failure.DIED}"]),
        (interrupt_all, (130, 130), ["error: interrupted"]),
        (stop_all, (EXIT_STOPPED, EXIT_STOPPED), []),
        (leave_rank_1, (3, 3), [f"error: rank 1 ({HOST}): called sys.exit(3)"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failure_ends_all_with_one_line(tmp_path, action, codes, lines):
    ended = run_ranks(tmp_path, Fail(action))
    assert tuple(rank.code for rank in ended) == codes
    assert ended[0].errors() + ended[1].errors() == lines
    # Only a bug is worth a traceback, and only that of the rank that has it.
    traces = sum("Traceback" in rank.said for rank in ended)
    assert traces == (action is on_rank_1_a_bug)


def test_a_rank_that_hangs_is_named_at_the_timeout(tmp_path):
    ended = run_ranks(tmp_path, Fail(freeze_rank_1), 3, env={"GUIDED_DIFFUSION_TIMEOUT": "4"})
    assert [rank.code for rank in ended] == [1, 1, 1]
    (line,) = ended[0].errors() + ended[1].errors() + ended[2].errors()
    assert f"timed out waiting for rank 1 ({HOST})" in line
    assert "no answer within 4 s (fail, " in line


def without_guard():
    dist_util.setup_dist()
    if dist_util.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(0.1)  # in no collective call at all


def test_the_watch_needs_no_guard_and_no_collective_call(tmp_path):
    ended = run_ranks(tmp_path, without_guard)
    assert [rank.code for rank in ended] == [1, -9]
    assert ended[0].errors() == [f"error: rank 1 ({HOST}): {failure.DIED}"]
