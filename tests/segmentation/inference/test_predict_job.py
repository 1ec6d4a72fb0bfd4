"""predict.py as a command: its spellings, its files, stopping and talking."""

import csv
import os
import signal

import numpy as np
import pytest
from conftest import TINY
from golden_util import fill_parameters
from PIL import Image

from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference.averaging import parse_timesteps
from guided_diffusion.segmentation.inference.job import (
    Job,
    PredictConfig,
    paths_from_arguments,
)
from guided_diffusion.segmentation.inference.results import find_items
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.prediction import Prediction


def make_model(path, classes=3):
    config = SegmentationConfig(TINY, ReadingConfig(16, 1), generic_categories(classes))
    save_model(str(path), config, fill_parameters(config.build()).state_dict())
    return path


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "segm.pth")


def grey(path, height=9, width=11, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(values).save(path)


def areas(folder):
    return list(csv.DictReader((folder / "areas.csv").open()))


def test_masks_of_an_earlier_command_are_named(script, tmp_path, model):
    for name in "ab":
        grey(tmp_path / f"{name}.png")
    assert "warning" not in script("predict.py", model, "a.png", "out").err
    assert "warning" not in script("predict.py", model, "a.png", "out").err
    ended = script("predict.py", model, "b.png", "out")
    assert (
        "1 masks there are of an earlier command, not in areas.csv, such as MASK/a.png" in ended.err
    )
    assert not (tmp_path / "out" / "run.lock").exists()


def test_the_spellings_of_a_plain_unet(script, tmp_path, model):
    for name in "abc":
        grey(tmp_path / f"{name}.png", seed=ord(name))
    ended = script("predict.py", "-m", model, "-i", "c.png", "a.png", "b.png", "-o", "out")
    assert ended.code == 0, ended.err
    assert [row["name"] for row in areas(tmp_path / "out")] == ["c", "a", "b"]
    assert script("predict.py", "--model", model, "a.png", "pos").code == 0
    assert [row["name"] for row in areas(tmp_path / "pos")] == ["a"]
    ended = script("predict.py", model, "--batch_size", 1, "b.png", "--viz", "False", "split")
    assert ended.code == 0, ended.err
    assert [row["name"] for row in areas(tmp_path / "split")] == ["b"]
    ended = script("predict.py", "-m", model, "-i", "a.png", "b.png", "-o", "x.png", "y/z.tif")
    assert ended.code == 0, ended.err
    with Image.open(tmp_path / "y/z.tif") as mask:
        assert np.array_equal(mask, Image.open(tmp_path / "out/MASK/b.png"))
    assert not (tmp_path / "x.png").is_dir()
    ended = script("predict.py", "-m", model, "-i", "a.png", "b.png", "-o", "x.png")
    assert (ended.code, "1 files for 2 radiographs" in ended.err) == (2, True)


def test_paths_from_flags_and_arguments():
    def find(*places, **flags):
        return paths_from_arguments(PredictConfig(**flags), places)

    assert find("m", "i", "o") == ("m", ["i"], ["o"])
    assert find("m", "i") == ("m", ["i"], ["results"])
    assert find("i", "o", model="m") == ("m", ["i"], ["o"])
    assert find("m", "o", interactive=True) == ("m", [], ["o"])
    for places, flags in ((("m",), {}), ((), {"input": ("i",)}), (tuple("mioz"), {})):
        with pytest.raises(UserError, match=r"required|too many"):
            find(*places, **flags)


def test_uncertainty_is_scored_and_saved(script, tmp_path, model):
    for seed, name in enumerate("abcd"):
        grey(tmp_path / "in" / f"{name}.png", 20, 31, seed)
    argv = ("predict.py", model, "in", "out", "--timesteps", "1,50", "--tta", "shifts")
    ended = script(*argv, "--save_uncertainty", "--batch_size", 3)
    assert ended.code == 0, ended.err
    rows = areas(tmp_path / "out")
    assert [row["name"] for row in rows] == list("abcd")
    for row in rows:
        stored = np.load(tmp_path / f"out/UNCERTAINTY/{row['name']}.npz")
        assert stored["uncertainty"].dtype == np.float16
        for name in ("uncertainty", "disagreement"):
            assert stored[name].shape == (20, 31)
            assert float(row[name]) == pytest.approx(stored[name].astype(float).mean(), rel=1e-3)
        with Image.open(tmp_path / f"out/UNCERTAINTY/{row['name']}.png") as picture:
            assert (picture.mode, picture.size) == ("RGB", (31, 20))
    least = max(rows, key=lambda row: float(row["uncertainty"]))
    assert f"to label next: {least['name']}, the least certain" in ended.out
    assert script("predict.py", model, "in", "in/out", "--save_uncertainty").code == 0
    assert len(find_items(str(tmp_path / "in"), str(tmp_path / "in" / "out"))) == 4


def test_several_checkpoints(script, tmp_path, model):
    grey(tmp_path / "a.png")
    make_model(tmp_path / "other.pth", classes=2)
    assert script("predict.py", f"{model},{model}", "a.png", "out").code == 0
    assert float(areas(tmp_path / "out")[0]["disagreement"]) == pytest.approx(0, abs=1e-6)
    ended = script("predict.py", f"{model},other.pth", "a.png", "out")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "3 classes" in ended.err


def test_the_threshold_of_two_classes(script, tmp_path, model):
    grey(tmp_path / "a.png")
    binary = make_model(tmp_path / "binary.pth", classes=2)
    counts = []
    for threshold in (0, 0.5, 1):
        argv = ("predict.py", binary, "a.png", "out", "-t", threshold, "--save_probabilities")
        assert script(*argv).code == 0
        counts.append(int(areas(tmp_path / "out")[0]["class 1 pixels"]))
    assert counts[0] == 81  # the centre; the rest is cut off and background
    assert counts[2] == 0
    assert 0 < counts[1] < 81
    ended = script("predict.py", model, "a.png", "out", "-t", 0.5)
    assert (ended.code, "2 classes" in ended.err) == (2, True)
    ended = script("predict.py", binary, "a.png", "out", "-t", 5)
    assert (ended.code, "between 0 and 1" in ended.err) == (2, True)


def test_timesteps_are_numbers():
    assert parse_timesteps("1,50.5") == (1, 50.5)
    assert parse_timesteps("") == ()
    for text in ("a", "1,-2", "nan"):
        with pytest.raises(UserError, match="--timesteps"):
            parse_timesteps(text)


class Halves:
    """A predictor that calls everything class 1; `at` is asked before each batch."""

    categories = generic_categories(2)

    def __init__(self, at=lambda count: None):
        self.count, self.at = 0, at

    def read(self, path):
        return np.asarray(Image.open(path))

    def start(self, images):
        self.at(self.count)
        self.count += 1
        flat = [np.stack([np.zeros(i.shape), np.ones(i.shape)]).astype(np.float32) for i in images]
        return [lambda p=p: Prediction(p, np.zeros(p.shape[1:], np.float32)) for p in flat]


def test_a_signal_ends_it_with_what_is_done(tmp_path, capsys):
    for n in range(9):
        grey(tmp_path / "in" / f"{n}.png")
    items = find_items(str(tmp_path / "in"), "")
    predictor = Halves(lambda count: count == 2 and os.kill(os.getpid(), signal.SIGINT))
    out = str(tmp_path / "out")
    job = Job(predictor, PredictConfig(batch_size=2), predictor.categories, out, {})
    assert job.run(items) == 75
    rows = areas(tmp_path / "out")
    assert [row["name"] for row in rows] == [str(n) for n in range(6)]
    assert len(list((tmp_path / "out/MASK").iterdir())) == 6
    assert "stopped by SIGINT after 6 of 9" in capsys.readouterr().err


def test_an_error_amid_the_work_leaves_whole_files(tmp_path):
    for n in range(6):
        grey(tmp_path / "in" / f"{n}.png")
    whole = (tmp_path / "in/4.png").read_bytes()
    (tmp_path / "in/4.png").write_bytes(whole[:41] + b"damaged" + whole[48:])
    predictor = Halves()
    predictor.read = read_image
    items = find_items(str(tmp_path / "in"), "")
    job = Job(
        predictor, PredictConfig(batch_size=2), predictor.categories, str(tmp_path / "out"), {}
    )
    with pytest.raises(UserError, match=r"4\.png"):
        job.run(items)
    for path in (tmp_path / "out/MASK").iterdir():
        Image.open(path).load()


def test_a_conversation(tmp_path, capsys):
    grey(tmp_path / "a b.png")
    answers = iter([str(tmp_path / "none.png"), f"'{tmp_path / 'a b.png'}'", "", "never"])
    predictor = Halves()
    out = str(tmp_path / "out")
    job = Job(predictor, PredictConfig(), predictor.categories, out, {})
    assert job.converse(lambda prompt: next(answers)) == 0
    assert next(answers) == "never"
    said = capsys.readouterr()
    assert "none.png does not exist" in said.err
    assert "a b: class 1 100.0 %; uncertainty 0.0000" in said.out
    assert (tmp_path / "out/MASK/a b.png").exists()


def test_the_conversation_from_the_command_line(script, tmp_path, model, monkeypatch):
    grey(tmp_path / "a.png")
    answers = iter(["a.png"])

    def ask(prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    ended = script("predict.py", model, "--interactive", "--no-save")
    assert ended.code == 0, ended.err
    assert "class 1" in ended.out
    assert not (tmp_path / "results").exists()
