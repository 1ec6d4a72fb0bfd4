"""guided_diffusion.logger: nothing is lost, nothing is said twice, every bit is kept."""

import json
import os
import struct

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from log_util import fresh_logger, read_rows  # noqa: F401 - a fixture

from guided_diffusion import logger
from guided_diffusion.logger import KVWriter, Logger, mpi_weighted_mean, pending_of_rank
from guided_diffusion.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_logger")


class Kept(KVWriter):
    """Keeps the rows."""

    def __init__(self):
        self.rows = []

    def writekvs(self, kvs):
        self.rows.append(dict(kvs))


class TestRows:
    def test_values_and_means(self):
        kept = Kept()
        log = Logger(None, [kept])
        log.logkv("step", 3)
        log.logkv("lr", 0.1)
        log.logkv("lr", 0.2)  # the last call counts
        for value in (1.0, np.float32(2.5), th.tensor(4.0), th.tensor([0.5], requires_grad=True)):
            log.logkv_mean("loss", value)
        assert log.getkvs() == {"step": 3, "lr": 0.2, "loss": 2.0}
        assert log.dumpkvs() == {"step": 3, "lr": 0.2, "loss": 2.0}
        assert log.dumpkvs() == {}
        assert kept.rows == [{"step": 3, "lr": 0.2, "loss": 2.0}, {}]

    def test_means_of_means_count_their_parts(self):
        log = Logger(None, [])
        log.logkv_mean("x", 2.0, count=3)
        log.logkv_mean("x", th.tensor(6.0))
        assert log.get_pending() == {"x": (12.0, 4)}
        assert log.dumpkvs() == {"x": 3.0}

    def test_a_tensor_is_logged_as_it_was(self):
        log = Logger(None, [])
        scale = th.tensor(2.0)
        log.logkv("scale", scale)
        scale.fill_(99.0)
        assert log.getkvs() == {"scale": 2.0}

    @given(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20),
        st.integers(0, 20),
    )
    def test_a_resumed_mean_has_the_same_bits(self, values, cut):
        """...also when the pending row goes through a file."""
        whole, first, second = (Logger(None, []) for _ in range(3))
        for value in values:
            whole.logkv_mean("x", value)
        for value in values[:cut]:
            first.logkv_mean("x", value)
        second.set_pending(json.loads(json.dumps(first.get_pending())))
        for value in values[cut:]:
            second.logkv_mean("x", value)
        left, right = whole.dumpkvs()["x"], second.dumpkvs()["x"]
        assert struct.pack("d", left) == struct.pack("d", right)

    def test_pending_is_plain_and_does_not_end_the_row(self):
        log = Logger(None, [])
        log.logkv_mean("x", th.tensor(1.5))
        log.logkv_mean("x", 2)
        log.logkv("lr", np.float64(0.25))
        log.logkv("n", th.tensor(7))
        pending = log.get_pending()
        assert pending == {"x": (3.5, 2), "lr": (0.25, 0), "n": (7, 0)}
        assert {type(value) for value, _ in pending.values()} == {float, int}
        assert log.getkvs() == {"x": 1.75, "lr": 0.25, "n": 7}

    def test_levels(self, capsys):
        logger.debug("one")
        logger.info("two", 2)
        logger.set_level(logger.ERROR)
        logger.warn("three")
        logger.error("four")
        assert capsys.readouterr().out == "two 2\nfour\n"
        logger.set_level(logger.DISABLED)
        logger.error("five")
        logger.logkv("x", 1)
        logger.dumpkvs()
        assert capsys.readouterr().out == ""

    def test_profile(self):
        @logger.profile("work")
        def work():
            """Its own words."""
            return 5

        assert work() == 5
        once = logger.getkvs()["wait_work"]
        assert 0 < once < 1
        work()
        assert logger.getkvs()["wait_work"] > once
        assert work.__doc__ == "Its own words."
        with pytest.raises(KeyError), logger.profile_kv("other"):
            raise KeyError
        assert logger.getkvs()["wait_other"] > 0


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    def test_sums_wait_for_nothing_and_have_the_cpu_s_bits(self):
        values = th.randn(50, generator=th.Generator().manual_seed(0))
        on_cpu, on_gpu, resumed = (Logger(None, []) for _ in range(3))
        on_cpu.logkv_mean("x", 0.3)
        for value in values:
            on_cpu.logkv_mean("x", value)
        on_gpu.logkv_mean("x", 0.3)
        moved = values.cuda()
        th.cuda.synchronize()
        th.cuda.set_sync_debug_mode("error")
        try:
            for value in moved[:20]:
                on_gpu.logkv_mean("x", value)
        finally:
            th.cuda.set_sync_debug_mode("default")
        resumed.set_pending(on_gpu.get_pending())
        for value in moved[20:]:
            resumed.logkv_mean("x", value)
        assert resumed.dumpkvs() == on_cpu.dumpkvs()


class TestConfigure:
    def test_files_of_the_defaults(self, tmp_path, capsys):
        logger.configure(str(tmp_path / "run"))
        assert logger.get_dir() == str(tmp_path / "run")
        logger.logkvs({"step": 1, "x": 0.5})
        logger.dumpkvs()
        assert capsys.readouterr().out.count("\n") == 5
        assert {path.name for path in (tmp_path / "run").iterdir()} == {
            "log.txt",
            "progress.csv",
            "tb",
        }

    def test_environment(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
        monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv, json")
        logger.configure()
        logger.logkv("x", 1)
        logger.dumpkvs()
        assert sorted(os.listdir(tmp_path / "run")) == ["progress.csv", "progress.json"]
        assert capsys.readouterr().out == ""

    def test_without_a_folder_it_is_a_new_one_here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        logger.configure(format_strs=["log"])
        (folder,) = (tmp_path / "runs").iterdir()
        assert os.path.samefile(logger.get_dir(), folder)

    def test_other_ranks_write_a_log_of_their_own(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "3")
        logger.configure(str(tmp_path))
        logger.logkv("x", 1)
        logger.dumpkvs()
        assert os.listdir(tmp_path) == ["log-rank003.txt"]
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        "name", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"]
    )
    def test_rank_from_the_environment(self, name, monkeypatch):
        assert logger.get_rank_without_mpi_import() == 0
        monkeypatch.setenv(name, "2")
        assert logger.get_rank_without_mpi_import() == 2

    def test_unknown_format(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,cvs")
        with pytest.raises(UserError, match="unknown format 'cvs'"):
            logger.configure(str(tmp_path))

    def test_a_second_run_in_the_same_folder(self, tmp_path):
        for resume_step, steps in ((None, (10, 20, 30)), (20, (30, 40))):
            logger.configure(str(tmp_path), ["csv", "log", "json"], resume_step=resume_step)
            for step in steps:
                logger.logkv("step", step)
                logger.dumpkvs()
            logger.reset()
        steps = [row["step"] for row in read_rows(tmp_path / "progress.csv")]
        assert steps == ["10", "20", "30", "40"]
        assert (tmp_path / "log.txt").read_text().count("| step |") == 5

    def test_scope(self, tmp_path):
        logger.configure(str(tmp_path / "outer"), ["csv"])
        logger.logkv("x", 1)
        with logger.scoped_configure(str(tmp_path / "inner"), ["csv"]):
            logger.logkv("x", 2)
            logger.dumpkvs()
            assert logger.get_dir() == str(tmp_path / "inner")
        logger.dumpkvs()
        assert [row["x"] for row in read_rows(tmp_path / "outer" / "progress.csv")] == ["1"]
        assert [row["x"] for row in read_rows(tmp_path / "inner" / "progress.csv")] == ["2"]

    def test_unconfigured_it_makes_no_folder(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        logger.log("hello")
        logger.logkv("x", 1)
        logger.dumpkvs()
        assert logger.get_dir() is None
        assert capsys.readouterr().out.startswith("hello\n---")
        assert os.listdir(tmp_path) == []


class FakeComm:
    """A communicator of ranks that speak one after the other, rank 0 last."""

    def __init__(self, rank, box):
        self.rank = rank
        self.box = box

    def gather(self, obj):
        self.box[self.rank] = obj
        return [self.box[rank] for rank in sorted(self.box)] if self.rank == 0 else None


class TestRanks:
    def test_weighted_mean(self):
        box = {}
        of_1 = {"loss": (3.0, 1), "step": (5, 1), "only_1": (2.0, 4), "text": ("b", 1)}
        of_0 = {"loss": (1.0, 3), "step": (5, 1), "text": ("a", 1)}
        assert mpi_weighted_mean(FakeComm(1, box), of_1) == {}
        means = mpi_weighted_mean(FakeComm(0, box), of_0)
        assert means == {"loss": 1.5, "step": 5, "text": "a", "only_1": 2.0}
        assert isinstance(means["step"], int)

    def test_rows_are_means_over_the_ranks(self):
        box, kept = {}, Kept()
        one, zero = Logger(None, [kept], FakeComm(1, box)), Logger(None, [kept], FakeComm(0, box))
        for log, values in ((one, [1.0, 2.0, 3.0]), (zero, [6.0])):
            for value in values:
                log.logkv_mean("loss", value)
            log.logkv("step", 4)
        assert one.dumpkvs() == {}
        assert zero.dumpkvs() == {"loss": 3.0, "step": 4}
        assert kept.rows == [{"loss": 3.0, "step": 4}]

    def test_pending_rows_of_a_run_with_other_ranks(self):
        gathered = [{"x": (1.0, 2), "lr": (0.5, 0)}, {"x": (3.0, 1), "lr": (0.5, 0)}]
        assert pending_of_rank(gathered, 1, 2) == gathered[1]
        assert pending_of_rank(gathered, 0, 4) == {"x": (4.0, 3), "lr": (0.5, 0)}
        assert pending_of_rank(gathered, 1, 4) == {}
