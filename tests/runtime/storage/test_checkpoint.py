"""runtime.storage.checkpoint: whole or not at all, found again, checked, pruned."""

import errno
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from hypothesis import example, given, settings
from hypothesis import strategies as st
from process_util import small_disk

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint, files
from guided_diffusion.runtime.storage.files import save_json, write_atomically


def weights(seed: int, size: int = 1000) -> dict[str, th.Tensor]:
    return {"a.weight": th.from_numpy(np.random.default_rng(seed).standard_normal(size))}


def save_step(folder, step: int, size: int = 1000) -> None:
    parts = {
        "model": weights(step, size),
        "ema_0.9_": weights(step + 1, size),
        "opt": {"state": step},
    }
    checkpoint.save_step(str(folder), step, parts, {"more": [1.5, None]})


def names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def files_of(step: int) -> set[str]:
    return {f"{prefix}{step:06d}.pt" for prefix in ("model", "ema_0.9_", "opt", "state")}


class TestFiles:
    def test_what_was_saved_comes_back(self, tmp_path):
        path = str(tmp_path / "new folder" / "x.pt")
        value = {"t": th.arange(5.0), "plain": [1, "two", None, 3.5, {"k": (True,)}]}
        said = checkpoint.save(path, value)
        assert said == checkpoint.file_fingerprint(path)
        assert said["size"] == os.path.getsize(path)
        back = checkpoint.load(path)
        assert th.equal(back["t"], value["t"])
        assert back["plain"] == value["plain"]
        assert names(tmp_path / "new folder") == {"x.pt"}

    def test_nothing_in_a_file_is_executed(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        th.save({"a": Harmful()}, tmp_path / "x.pt")
        (tmp_path / "y.pt").write_bytes(pickle.dumps(Harmful()))
        for name in ("x.pt", "y.pt"):
            with pytest.raises(UserError, match=rf"{name} is not a readable checkpoint"):
                checkpoint.load(str(tmp_path / name))
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize("size", [0, 1, 100, 900])
    def test_a_piece_of_a_file_is_no_checkpoint(self, tmp_path, size):
        path = tmp_path / "x.pt"
        checkpoint.save(str(path), weights(0))
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"x\.pt is not a readable checkpoint: "):
            checkpoint.load(str(path))

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"x\.pt is missing"):
            checkpoint.load(str(tmp_path / "x.pt"))
        with pytest.raises(UserError, match="is a folder: name a"):
            checkpoint.load(str(tmp_path))

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (KeyError("x"), KeyError),
            (KeyboardInterrupt(), KeyboardInterrupt),
            (OSError(errno.EIO, "broken"), UserError),
        ],
    )
    def test_an_interrupted_write_changes_nothing(self, tmp_path, error, raised):
        path = tmp_path / "x"
        path.write_bytes(b"before")

        def write(file):
            file.write(b"after")
            raise error

        with pytest.raises(raised):
            write_atomically(str(path), write)
        assert path.read_bytes() == b"before"
        assert names(tmp_path) == {"x"}

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path, monkeypatch):
        done = []
        fsync, replace = os.fsync, os.replace

        def record(name, call):
            def recorded(*args):
                done.append(name)
                return call(*args)

            return recorded

        monkeypatch.setattr(os, "fsync", record("fsync", fsync))
        monkeypatch.setattr(os, "replace", record("replace", replace))
        checkpoint.save(str(tmp_path / "x.pt"), weights(0))
        assert done == ["fsync", "replace", "fsync"]  # the file; its name; the folder

    def test_json(self, tmp_path):
        path = tmp_path / "config.json"
        save_json(str(path), {"a": [1, None]})
        assert json.loads(path.read_text()) == {"a": [1, None]}
        with pytest.raises(ValueError, match="JSON"):
            save_json(str(path), {"a": float("nan")})
        assert json.loads(path.read_text()) == {"a": [1, None]}


class _Full:
    """A file on a disk that takes `room[0]` bytes more."""

    def __init__(self, file, room: list[int]):
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room[0] -= len(data)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


class TestFullDisk:
    @given(st.integers(0, 25_000))
    @example(0)
    @example(25_000)
    @settings(max_examples=30, deadline=None)
    def test_wherever_it_is_full(self, tmp_path_factory, room):
        folder = tmp_path_factory.mktemp("run")
        save_step(folder, 1)
        said, left = "", [room]

        def opened(*args):
            return _Full(open(*args), left)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "open", opened, raising=False)
            try:
                save_step(folder, 2)
            except UserError as error:
                said = str(error)
        full = left[0] < 0
        assert full == bool(re.match(r"no space left to write .*2\.pt: free some", said))
        assert full or room > 17_000  # the two files of weights
        assert checkpoint.newest_state(str(folder))[0] == (1 if full else 2)
        assert not [name for name in names(folder) if name.endswith(".tmp")]

    def test_full_when_flushed(self, tmp_path, monkeypatch):
        def fsync(descriptor):
            raise OSError(errno.EDQUOT, "quota")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="no space left"):
            checkpoint.save(str(tmp_path / "x.pt"), weights(0))
        assert names(tmp_path) == set()

    def test_a_small_file_system(self, tmp_path):
        folder = tmp_path / "small"
        with small_disk(folder, "200k"):
            save_step(folder, 1, size=5000)
            with pytest.raises(UserError, match="no space left to write"):
                save_step(folder, 2, size=9000)
            assert checkpoint.newest_state(str(folder))[0] == 1
            save_step(folder, 2, size=4000)  # once there is room, the same command resumes
            assert checkpoint.newest_state(str(folder))[0] == 2


class TestSteps:
    def test_names_are_the_originals(self, tmp_path):
        save_step(tmp_path, 1234567)
        assert names(tmp_path) == files_of(1234567)
        assert checkpoint.step_name(checkpoint.ema_prefix(0.9999), 10) == "ema_0.9999_000010.pt"
        assert checkpoint.complete_steps(str(tmp_path)) == [1234567]

    def test_no_folder_no_steps(self, tmp_path):
        assert checkpoint.complete_steps(str(tmp_path / "none")) == []
        assert checkpoint.newest_state(str(tmp_path / "none")) is None

    @pytest.mark.parametrize("written", range(4))
    def test_complete_with_the_last_file_only(self, tmp_path, monkeypatch, written):
        save_step(tmp_path, 9)
        order, write = [], write_atomically

        def interrupted(path, fill):
            if len(order) == written:
                raise KeyboardInterrupt
            order.append(os.path.basename(path))
            write(path, fill)

        monkeypatch.setattr(checkpoint, "write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_step(tmp_path, 10)
        assert len(names(tmp_path)) == 4 + written
        assert checkpoint.complete_steps(str(tmp_path)) == [9]
        assert checkpoint.newest_state(str(tmp_path))[0] == 9

    @pytest.mark.parametrize("name", sorted(files_of(10)))
    @pytest.mark.parametrize("damage", ["remove", "shorten", "flip a bit", "replace"])
    def test_a_damaged_newest_one_is_passed_over(self, tmp_path, name, damage):
        save_step(tmp_path, 9)
        save_step(tmp_path, 10)
        path = tmp_path / name
        content = bytearray(path.read_bytes())
        if damage == "remove":
            path.unlink()
        elif damage == "shorten":
            path.write_bytes(content[:-20])
        elif damage == "flip a bit":
            content[content.index(b"files") if "state" in name else len(content) // 2] ^= 4
            path.write_bytes(content)
        else:
            path.write_bytes((tmp_path / name.replace("10", "09")).read_bytes())
        if name == "state000010.pt" and damage == "remove":  # that is no damage: it is incomplete
            step, state = checkpoint.newest_state(str(tmp_path))
        else:
            with pytest.warns(UserWarning, match="checkpoint at step 10 is unusable: ") as warned:
                step, state = checkpoint.newest_state(str(tmp_path))
            assert name in str(warned[0].message)
        assert (step, state["step"], state["more"]) == (9, 9, [1.5, None])

    def test_all_damaged(self, tmp_path):
        save_step(tmp_path, 9)
        (tmp_path / "opt000009.pt").write_bytes(b"")
        with pytest.warns(UserWarning, match="step 9 is unusable"):
            assert checkpoint.newest_state(str(tmp_path)) is None

    def test_models_of_another_program(self, tmp_path):
        folder = str(tmp_path)
        assert checkpoint.foreign_models(folder) == []
        th.save(weights(0), tmp_path / "model000010.pt")
        th.save(weights(0), tmp_path / "model000200.pt")
        assert checkpoint.foreign_models(folder) == ["model000010.pt", "model000200.pt"]
        checkpoint.write_config(folder, {})
        assert checkpoint.foreign_models(folder) == []


class TestPrune:
    @pytest.mark.parametrize("keep", [0, 1, 2, 7])
    def test_the_newest_stay(self, tmp_path, keep):
        for step in (1, 2, 10, 11):
            save_step(tmp_path, step)
        others = {"model000003.pt", "segm.pth", "config.json", "samples_000001.png", "progress.csv"}
        for name in others:
            (tmp_path / name).write_text("")
        checkpoint.prune(str(tmp_path), keep, 11)
        kept = [1, 2, 10, 11][-keep:]
        assert checkpoint.complete_steps(str(tmp_path)) == kept
        assert names(tmp_path) == others.union(*map(files_of, kept))

    def test_damaged_later_ones_do_not_count(self, tmp_path):
        for step in (10, 20):
            save_step(tmp_path, step)
        (tmp_path / "model000020.pt").write_bytes(b"")
        with pytest.warns(UserWarning, match="step 20"):
            assert checkpoint.newest_state(str(tmp_path))[0] == 10
        save_step(tmp_path, 15)  # the run went back to 10 and has come as far as 15
        checkpoint.prune(str(tmp_path), 1, 15)
        with pytest.warns(UserWarning, match="step 20"):
            assert checkpoint.newest_state(str(tmp_path))[0] == 15

    @pytest.mark.parametrize("removed", range(4))
    def test_interrupted(self, tmp_path, monkeypatch, removed):
        for step in (1, 2):
            save_step(tmp_path, step)
        remove, count = checkpoint.bf.remove, [0]

        def interrupted(path):
            if count[0] == removed:
                raise KeyboardInterrupt
            count[0] += 1
            remove(path)

        monkeypatch.setattr(checkpoint.bf, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(str(tmp_path), 1, 2)
        assert checkpoint.complete_steps(str(tmp_path)) == ([1, 2] if removed == 0 else [2])
        assert checkpoint.newest_state(str(tmp_path))[0] == 2

    def test_what_killed_processes_left(self, tmp_path):
        mine = {
            ".config.json.7.tmp",
            ".model000007.pt.12.tmp",
            ".ema_0.9_000007.pt.12.tmp",
            ".state000007.pt.99.tmp",
            ".progress.csv.12.tmp",
        }
        others = {
            ".samples.npz.12.tmp",
            "model.tmp",
            ".segm.pth.12.tmp",
            ".progress-rank001.csv.1.tmp",
        }
        for name in mine | others:
            (tmp_path / name).write_text("")
        save_step(tmp_path, 8)
        assert names(tmp_path) == others | files_of(8)


class TestConfig:
    def test_round_trip(self, tmp_path):
        checkpoint.write_config(str(tmp_path), {"reading": ReadingConfig(32, 1), "kind": "x"})
        for source in (tmp_path, tmp_path / "model000010.pt"):
            config = checkpoint.read_config(str(source))
            assert config["kind"] == "x"
            assert config["reading"]["image_size"] == 32

    def test_none_or_damaged(self, tmp_path):
        assert checkpoint.read_config(str(tmp_path / "model000010.pt")) is None
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
            checkpoint.read_config(str(tmp_path))

    def test_beside_a_file_named_without_a_folder(self, tmp_path, monkeypatch):
        checkpoint.write_config(str(tmp_path), {"kind": "x"})
        monkeypatch.chdir(tmp_path)
        assert checkpoint.read_config("model000010.pt") == {"kind": "x"}


class _Cloud:
    """blobfile, with cloud://BUCKET as a folder of this machine, without temporary names."""

    def __init__(self, real, folder: Path):
        self._real, self._folder = real, folder

    def __getattr__(self, name):
        call = getattr(self._real, name)

        def here(path, *args, **kwargs):
            return call(path.replace("cloud:/", str(self._folder)), *args, **kwargs)

        return here

    def join(self, *parts):
        return "/".join(parts)

    def dirname(self, path):
        return path.rpartition("/")[0]


def test_a_run_in_the_cloud(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    cloud = _Cloud(checkpoint.bf, tmp_path)
    monkeypatch.setattr(checkpoint, "bf", cloud)
    monkeypatch.setitem(sys.modules, "blobfile", cloud)  # of those who import it when needed
    folder = "cloud://run"
    checkpoint.write_config(folder, {"kind": "x"})
    for step in (1, 2, 3):
        save_step(folder, step)
    checkpoint.prune(folder, 2, 3)
    assert names(tmp_path / "run") == {"config.json"} | files_of(2) | files_of(3)
    assert checkpoint.read_config(f"{folder}/model000003.pt") == {"kind": "x"}
    assert th.equal(checkpoint.load(f"{folder}/model000003.pt")["a.weight"], weights(3)["a.weight"])
    (tmp_path / "run" / "opt000003.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"cloud://run/opt000003\.pt is damaged"):
        assert checkpoint.newest_state(folder)[0] == 2


@pytest.mark.parametrize("name", ["model000010.pt", "segm.pth"])
def test_a_bit_that_flipped_in_the_weights_is_noticed(tmp_path, name):
    path = tmp_path / name
    checkpoint.save(str(path), {"a": th.arange(4096.0)})
    content = bytearray(path.read_bytes())
    content[content.index(th.tensor(2000.0).numpy().tobytes())] ^= 16
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged: its part .* differs.*copy it again"):
        checkpoint.load(str(path))
    for end in (0, 3, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=rf"{name} is not a readable checkpoint: it is damaged"):
            checkpoint.load(str(path))


def test_files_of_old_torch_have_no_checksums(tmp_path):
    th.save({"a": th.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert th.equal(checkpoint.load(str(tmp_path / "old.pt"))["a"], th.ones(3))


@pytest.mark.parametrize("text", ["null", "7", "[]", '"words"'])
def test_a_config_without_sections(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json holds no sections"):
        checkpoint.read_config(str(tmp_path))
