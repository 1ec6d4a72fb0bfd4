"""guided_diffusion.logger: nothing is lost, nothing is said twice, every bit is kept."""

import csv
import json
import math
import os
import shutil
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion import logger
from guided_diffusion.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    mpi_weighted_mean,
    pending_of_rank,
)
from guided_diffusion.runtime import log_formats
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.log_formats import LogFile


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Logger, "CURRENT", None)
    yield
    logger.reset()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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


class TestHuman:
    def test_table_and_messages(self, tmp_path):
        path = tmp_path / "log.txt"
        writer = HumanOutputFormat(str(path))
        writer.writeseq(["a", "b"])
        writer.writekvs({"loss": 0.123456789, "step": 100000, "k" * 60: "v" * 60})
        text = path.read_text()
        assert text.startswith("a b\n---")
        assert "| loss " in text
        assert "| 0.12346 " in text
        assert "| 100000 " in text
        table = text.splitlines()[1:]
        assert len({len(line) for line in table}) == 1
        assert len(table[0]) < 100

    def test_appends(self, tmp_path):
        path = tmp_path / "log.txt"
        path.write_text("an earlier run\nkilled in the mid")
        writer = HumanOutputFormat(str(path))
        writer.writeseq(["next"])
        assert path.read_text() == "an earlier run\nkilled in the mid\nnext\n"

    def test_any_stream(self, tmp_path):
        with open(tmp_path / "x", "w+") as stream:
            HumanOutputFormat(stream).writeseq(["x"])
            stream.seek(0)
            assert stream.read() == "x\n"

    def test_above_a_progress_bar_only_messages(self, tmp_path, capsys):
        logger.configure(str(tmp_path), ["tqdm", "csv"])
        logger.log("epoch", 1)
        logger.logkv("x", 1)
        logger.dumpkvs()
        assert capsys.readouterr().out == f"logging to {tmp_path}\nepoch 1\n"


class TestCSV:
    @given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
    def test_all_digits(self, tmp_path_factory, values):
        path = str(tmp_path_factory.mktemp("csv") / "progress.csv")
        writer = CSVOutputFormat(path)
        for value in values:
            writer.writekvs({"x": value})
        assert [float(row["x"]) for row in rows(path)] == values

    def test_kinds_of_values(self, tmp_path):
        path = str(tmp_path / "progress.csv")
        text = 'a,b "c"\nd'
        CSVOutputFormat(path).writekvs(
            {"a": 3, "b": None, "c": text, "d": np.float32(0.5), "e": th.tensor(2), "f": math.nan}
        )
        (row,) = rows(path)
        assert row == {"a": "3", "b": "", "c": 'a,b "c" d', "d": "0.5", "e": "2", "f": "nan"}

    def test_a_new_key_adds_a_column(self, tmp_path):
        path = str(tmp_path / "progress.csv")
        writer = CSVOutputFormat(path)
        writer.writekvs({"step": 1, "text": "x,y"})
        writer.writekvs({"step": 2, "b": 5, "a": 4})
        writer.writekvs({"a": 6})
        assert Path(path).read_text() == 'step,text,a,b\n1,"x,y",,\n2,,4,5\n,,6,\n'

    def test_a_second_writer_appends(self, tmp_path):
        path = str(tmp_path / "progress.csv")
        CSVOutputFormat(path).writekvs({"step": 1, "x": 0.5})
        CSVOutputFormat(path).writekvs({"x": 0.25, "step": 2, "y": 1})
        assert Path(path).read_text() == "step,x,y\n1,0.5,\n2,0.25,1\n"
        assert not (tmp_path / "progress_superseded.csv").exists()

    def test_rows_beyond_the_resumed_step_are_moved(self, tmp_path):
        path = str(tmp_path / "progress.csv")
        writer = CSVOutputFormat(path)
        for step in (10, 20, 30, 40):
            writer.writekvs({"step": step, "loss": step / 7})
        resumed = CSVOutputFormat(path, resume_step=20)
        for step in (30, 40, 50):
            resumed.writekvs({"step": step, "loss": step / 7})
        assert [row["step"] for row in rows(path)] == ["10", "20", "30", "40", "50"]
        aside = str(tmp_path / "progress_superseded.csv")
        assert [row["step"] for row in rows(aside)] == ["30", "40"]
        CSVOutputFormat(path, resume_step=40)
        assert [row["step"] for row in rows(path)] == ["10", "20", "30", "40"]
        assert [row["step"] for row in rows(aside)] == ["30", "40", "50"]
        CSVOutputFormat(path, resume_step=-1)
        assert rows(path) == []

    def test_a_half_written_row_is_moved(self, tmp_path):
        path = tmp_path / "progress.csv"
        path.write_text("step,loss\n10,0.5\n20,0.2")
        CSVOutputFormat(str(path)).writekvs({"step": 20, "loss": 0.25})
        assert path.read_text() == "step,loss\n10,0.5\n20,0.25\n"
        aside = tmp_path / "progress_superseded.csv"
        assert aside.read_text() == "loss,step\n0.2,20\n"

    @pytest.mark.parametrize("text", ["", "ste"])
    def test_a_half_written_header_is_dropped(self, tmp_path, text):
        path = tmp_path / "progress.csv"
        path.write_text(text)
        CSVOutputFormat(str(path), resume_step=0).writekvs({"step": 1})
        assert path.read_text() == "step\n1\n"

    def test_killed_at_every_write_no_row_is_lost(self, tmp_path, monkeypatch):
        """Whatever system call the process dies at, each row stands in one of the two files."""
        original = tmp_path / "original"
        original.mkdir()
        writer = CSVOutputFormat(str(original / "progress.csv"))
        for step in range(6):
            writer.writekvs({"step": step})

        class KilledError(Exception):
            pass

        for deadline in range(1, 20):
            folder = tmp_path / str(deadline)
            shutil.copytree(original, folder)
            calls = iter(range(1, 100))

            def dying(function, deadline=deadline, calls=calls):
                def call(*args, **kwargs):
                    if next(calls) == deadline:
                        raise KilledError
                    return function(*args, **kwargs)

                return call

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", dying(os.replace))
                patch.setattr(os, "fsync", dying(os.fsync))
                patch.setattr(LogFile, "append", dying(LogFile.append))
                try:
                    CSVOutputFormat(str(folder / "progress.csv"), resume_step=2)
                    finished = True
                except KilledError:
                    finished = False
            found = [row["step"] for row in rows(folder / "progress.csv")]
            if (folder / "progress_superseded.csv").exists():
                found += [row["step"] for row in rows(folder / "progress_superseded.csv")]
            assert set(found) == set("012345")
            if finished:
                break
        assert deadline > 3  # it did die at several places
        assert sorted(found) == list("012345")


class TestJSON:
    def test_rows(self, tmp_path):
        path = tmp_path / "progress.json"
        writer = JSONOutputFormat(str(path))
        writer.writekvs({"step": 1, "x": np.float32(0.5), "t": "a"})
        writer.writekvs({"step": 2, "x": th.tensor(0.25)})
        with path.open("a") as file:
            file.write('{"step": 3, "x"')
        JSONOutputFormat(str(path), resume_step=1)
        assert [json.loads(line) for line in path.read_text().splitlines()] == [
            {"step": 1, "t": "a", "x": 0.5}
        ]
        aside = (tmp_path / "progress_superseded.json").read_text()
        assert aside == '{"step": 2, "x": 0.25}\n{"step": 3, "x"\n'


class TestTensorBoard:
    @staticmethod
    def events(folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
        return {
            tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in accumulator.Tags()["scalars"]
        }

    def test_scalars_and_resuming(self, tmp_path):
        first = TensorBoardOutputFormat(str(tmp_path))
        for step in (10, 20, 30):
            first.writekvs({"step": step, "x": step / 10, "text": "no scalar"})
        # killed: not closed
        second = TensorBoardOutputFormat(str(tmp_path), resume_step=20)
        second.writekvs({"step": 30, "x": 3.5})
        second.close()
        assert self.events(tmp_path)["x"] == [(10, 1.0), (20, 2.0), (30, 3.5)]
        first.close()

    def test_rows_without_a_step_are_counted(self, tmp_path):
        writer = TensorBoardOutputFormat(str(tmp_path))
        writer.writekvs({"x": 1.0})
        writer.writekvs({"x": 2.0})
        writer.close()
        assert self.events(tmp_path)["x"] == [(1, 1.0), (2, 2.0)]

    def test_without_tensorboard_it_warns_once(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        writer = TensorBoardOutputFormat(str(tmp_path))
        with pytest.warns(UserWarning, match="no TensorBoard files"):
            writer.writekvs({"x": 1})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            writer.writekvs({"x": 1})
        writer.close()


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
        assert [row["step"] for row in rows(tmp_path / "progress.csv")] == ["10", "20", "30", "40"]
        assert (tmp_path / "log.txt").read_text().count("| step |") == 5

    def test_scope(self, tmp_path):
        logger.configure(str(tmp_path / "outer"), ["csv"])
        logger.logkv("x", 1)
        with logger.scoped_configure(str(tmp_path / "inner"), ["csv"]):
            logger.logkv("x", 2)
            logger.dumpkvs()
            assert logger.get_dir() == str(tmp_path / "inner")
        logger.dumpkvs()
        assert [row["x"] for row in rows(tmp_path / "outer" / "progress.csv")] == ["1"]
        assert [row["x"] for row in rows(tmp_path / "inner" / "progress.csv")] == ["2"]

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


class TestCloud:
    @pytest.fixture
    def cloud(self, tmp_path, monkeypatch):
        """gs://bucket/... as a local folder, and the number of transfers."""
        store, copies = tmp_path / "cloud", []

        def local(path):
            return str(store / path.removeprefix("gs://")) if "://" in path else path

        def copy(source, target, overwrite=False):
            assert overwrite or not os.path.exists(local(target))
            copies.append(target)
            shutil.copy(local(source), local(target))

        monkeypatch.setattr(log_formats.bf, "copy", copy)
        monkeypatch.setattr(log_formats.bf, "exists", lambda path: os.path.exists(local(path)))
        monkeypatch.setattr(
            log_formats.bf, "makedirs", lambda p: os.makedirs(local(p), exist_ok=True)
        )
        return store / "bucket" / "run", copies

    def test_files_are_sent_and_continued(self, cloud):
        folder, copies = cloud
        for step in (1, 2):
            with pytest.warns(UserWarning, match="not a local folder"):
                logger.configure("gs://bucket/run", ["csv", "log", "tensorboard"])
            logger.logkv("step", step)
            logger.dumpkvs()
            sent = len(copies)
            logger.flush()
            assert len(copies) == sent + 2
            logger.flush()
            assert len(copies) == sent + 2  # nothing new
            assert [row["step"] for row in rows(folder / "progress.csv")][-1] == str(step)
            logger.reset()
        assert [row["step"] for row in rows(folder / "progress.csv")] == ["1", "2"]
        assert (folder / "log.txt").read_text().count("logging to gs://bucket/run") == 2

    def test_rows_are_not_sent_one_by_one(self, cloud, monkeypatch):
        _, copies = cloud
        now = [0.0]
        monkeypatch.setattr(log_formats.time, "monotonic", lambda: now[0])
        writer = CSVOutputFormat("gs://bucket/progress.csv")
        os.makedirs(cloud[0])
        for step in range(100):
            now[0] += 1.0
            writer.writekvs({"step": step})
        assert len(copies) == 1
        writer.close()
        assert len(copies) == 2
