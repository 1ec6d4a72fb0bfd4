"""guided_diffusion.runtime.log_formats: nothing is lost, every bit is kept."""

import errno
import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from log_util import fresh_logger, read_rows  # noqa: F401 - a fixture

from guided_diffusion import logger
from guided_diffusion.runtime import log_formats
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.log_formats import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    LogFile,
    TensorBoardOutputFormat,
)

pytestmark = pytest.mark.usefixtures("fresh_logger")


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
        assert capsys.readouterr() == ("", f"logging to {tmp_path}\nepoch 1\n")


class TestCSV:
    @given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
    def test_all_digits(self, tmp_path_factory, values):
        path = str(tmp_path_factory.mktemp("csv") / "progress.csv")
        writer = CSVOutputFormat(path)
        for value in values:
            writer.writekvs({"x": value})
        assert [float(row["x"]) for row in read_rows(path)] == values

    def test_kinds_of_values(self, tmp_path):
        path = str(tmp_path / "progress.csv")
        text = 'a,b "c"\nd'
        CSVOutputFormat(path).writekvs(
            {"a": 3, "b": None, "c": text, "d": np.float32(0.5), "e": th.tensor(2), "f": math.nan}
        )
        (row,) = read_rows(path)
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
        assert [row["step"] for row in read_rows(path)] == ["10", "20", "30", "40", "50"]
        aside = str(tmp_path / "progress_superseded.csv")
        assert [row["step"] for row in read_rows(aside)] == ["30", "40"]
        CSVOutputFormat(path, resume_step=40)
        assert [row["step"] for row in read_rows(path)] == ["10", "20", "30", "40"]
        assert [row["step"] for row in read_rows(aside)] == ["30", "40", "50"]
        CSVOutputFormat(path, resume_step=-1)
        assert read_rows(path) == []

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
            found = [row["step"] for row in read_rows(folder / "progress.csv")]
            if (folder / "progress_superseded.csv").exists():
                found += [row["step"] for row in read_rows(folder / "progress_superseded.csv")]
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


class TestTrouble:
    @pytest.mark.parametrize("kind", [HumanOutputFormat, CSVOutputFormat, JSONOutputFormat])
    def test_the_folder_has_gone(self, tmp_path, kind):
        (tmp_path / "run").mkdir()
        writer = kind(str(tmp_path / "run" / "log"))
        writer.writekvs({"loss": 1.0})
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match=r"cannot write .*/run/log: its folder has gone"):
            writer.writekvs({"loss": 2.0})

    def test_a_full_disk_for_tensorboard(self, tmp_path, capsys):
        pytest.importorskip("tensorboard")
        writer = TensorBoardOutputFormat(str(tmp_path))
        writer.writekvs({"loss": 1.0})

        def fail(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        file_writer = writer._writer._get_file_writer().event_writer
        file_writer._async_writer._writer.write = fail

        def rows():  # its own thread may fail a little later
            for step in range(1000):
                writer.writekvs({"loss": 2.0, "step": step})

        with pytest.raises(UserError, match="no space left to write"):
            rows()
        file_writer._async_writer._worker.join()
        assert "Traceback" not in capsys.readouterr().err


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
            assert [row["step"] for row in read_rows(folder / "progress.csv")][-1] == str(step)
            logger.reset()
        assert [row["step"] for row in read_rows(folder / "progress.csv")] == ["1", "2"]
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
