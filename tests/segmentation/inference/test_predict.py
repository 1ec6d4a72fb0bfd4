"""Prediction: results at each radiograph's own size, whatever its shape."""

import csv
import json

import numpy as np
import pytest
import torch as th
from conftest import TINY, draw_pairs
from golden_util import fill_parameters
from PIL import Image

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference.predictor import Predictor, load_predictor
from guided_diffusion.segmentation.inference.results import find_items
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model, save_model
from guided_diffusion.segmentation.networks.kind import MemberOptions


def config(resize: str = "pad") -> SegmentationConfig:
    return SegmentationConfig(TINY, ReadingConfig(16, 1, resize), generic_categories(3))


@pytest.fixture
def model_path(tmp_path):
    path = tmp_path / "segm.pth"
    network = fill_parameters(config().build())
    save_model(str(path), config(), network.state_dict())
    return path


def grey(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.mark.parametrize("resize", ["pad", "crop", "squash", "native"])
@pytest.mark.parametrize("size", [(16, 16), (37, 90), (1, 5), (64, 9)])
def test_probabilities_have_the_files_own_size_and_sum_to_one(tmp_path, resize, size):
    grey(tmp_path / "a.png", *size)
    network = fill_parameters(config(resize).build())
    found = Predictor(network, config(resize)).probabilities(str(tmp_path / "a.png"))
    assert found.shape == (3, *size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-4)


def test_batches_of_different_sizes_are_as_single_images(tmp_path, model_path):
    predictor = load_predictor(str(model_path), "cpu")
    paths = []
    for i, size in enumerate([(20, 30), (16, 16), (50, 7)]):
        grey(tmp_path / f"{i}.png", *size, seed=i)
        paths.append(str(tmp_path / f"{i}.png"))
    together = predictor.segment([predictor.read(path) for path in paths])
    for path, probabilities in zip(paths, together):
        np.testing.assert_allclose(predictor.probabilities(path), probabilities, atol=1e-5)


def test_a_model_file_holds_all_there_is_to_know(model_path):
    model, found, _ = load_model(str(model_path))
    assert found == config()
    assert model.timestep == 1
    assert not model.training


def test_the_script_writes_masks_colours_overlays_and_areas(script, tmp_path, model_path):
    grey(tmp_path / "in" / "a.png", 20, 31)
    grey(tmp_path / "in" / "sub" / "b.tif", 40, 17)
    ended = script("predict.py", model_path, "in", "out", "--save_probabilities", "True")
    assert ended.code == 0, ended.err
    for name, size in (("a", (20, 31)), ("sub/b", (40, 17))):
        mask = np.asarray(Image.open(tmp_path / f"out/MASK/{name}.png"))
        color = Image.open(tmp_path / f"out/COLOR/{name}.png")
        assert mask.shape == size
        assert color.mode == "P"
        assert np.array_equal(np.asarray(color), mask)
        assert Image.open(tmp_path / f"out/OVERLAY/{name}.png").size == size[::-1]
        stored = np.load(tmp_path / f"out/PROBABILITIES/{name}.npz")["probabilities"]
        likeliest = np.take_along_axis(stored, mask[None].astype(int), 0)[0]
        np.testing.assert_allclose(likeliest, stored.max(0), atol=2e-3)  # halves hold ties
        assert mask.max() <= 2
    rows = list(csv.DictReader((tmp_path / "out/areas.csv").open()))
    assert [row["name"] for row in rows] == ["a", "sub/b"]
    pixels = [int(rows[0][f"{c.name} pixels"]) for c in generic_categories(3)]
    assert sum(pixels) == 20 * 31
    mask = np.asarray(Image.open(tmp_path / "out/MASK/a.png"))
    assert pixels == np.bincount(mask.ravel(), minlength=3).tolist()


def test_a_file_a_glob_and_no_save(script, tmp_path, model_path):
    for name in "ab":
        grey(tmp_path / f"{name}.png", 9, 9)
    assert script("predict.py", model_path, "a.png", "one").code == 0
    assert script("predict.py", model_path, "*.png", "two").code == 0
    assert len(list((tmp_path / "two/MASK").iterdir())) == 2
    assert script("predict.py", model_path, "a.png", "none", "--no_save", "True").code == 0
    assert not (tmp_path / "none").exists()


def test_results_inside_the_input_folder_are_no_input_the_next_time(tmp_path, script, model_path):
    grey(tmp_path / "in" / "a.png", 9, 9)
    for _ in range(2):
        assert script("predict.py", model_path, "in", "in/results").code == 0
    assert len(find_items(str(tmp_path / "in"), str(tmp_path / "in/results"))) == 1


def test_links_are_radiographs_of_their_own(tmp_path):
    grey(tmp_path / "in" / "a.png", 9, 9)
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to("in")
    items = find_items([str(tmp_path / "in"), str(tmp_path / "link"), str(tmp_path)], "")
    assert [item.name for item in items] == ["a", "b"]


def test_other_names_and_colours(script, tmp_path, model_path):
    grey(tmp_path / "a.png", 9, 9)
    table = (
        '[{"index":0,"name":"none","color":[0,0,0]},{"index":1,"name":"left","color":[9,8,7]},'
        '{"index":2,"name":"right","color":[1,2,3]}]'
    )
    (tmp_path / "c.json").write_text(table)
    ended = script("predict.py", model_path, "a.png", "out", "--categories", "c.json")
    assert ended.code == 0, ended.err
    palette = Image.open(tmp_path / "out/COLOR/a.png").getpalette()
    assert palette[3:9] == [9, 8, 7, 1, 2, 3]
    assert "left pixels" in (tmp_path / "out/areas.csv").read_text()


def test_bad_files_are_refused_before_work_or_skipped(script, tmp_path, model_path):
    grey(tmp_path / "in" / "a.png", 9, 9)
    (tmp_path / "in" / "b.png").write_text("no picture")
    whole = (tmp_path / "in" / "a.png").read_bytes()
    ended = script("predict.py", model_path, "in", "out")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "b.png" in ended.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "c.png").write_bytes(whole[: len(whole) // 2])
    ended = script("predict.py", model_path, "in", "out", "--skip_bad_images", "True")
    assert ended.code == 0, ended.err
    assert ended.err.count("skipped: ") == 2
    assert [p.name for p in (tmp_path / "out/MASK").iterdir()] == ["a.png"]
    (tmp_path / "in" / "a.png").write_text("no picture either")
    ended = script("predict.py", model_path, "in", "other", "--skip_bad_images", "True")
    assert (ended.code, "none of the 3" in ended.err) == (2, True)


def test_two_files_of_one_name_are_refused_before_anything_is_written(script, tmp_path, model_path):
    grey(tmp_path / "in" / "a.png", 9, 9)
    grey(tmp_path / "in" / "a.bmp", 9, 9)
    ended = script("predict.py", model_path, "in", "out")
    assert ended.code == 2
    assert "MASK/a.png" in ended.err
    assert not (tmp_path / "out").exists()


def test_what_is_no_segmentation_model_is_refused(script, tmp_path, pretrained):
    grey(tmp_path / "a.png", 9, 9)
    ended = script("predict.py", pretrained, "a.png", "out")
    assert ended.code == 2
    assert "not a segmentation model" in ended.err
    ended = script("predict.py", "missing.pth", "a.png", "out")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    with pytest.raises(UserError, match="not a segmentation model"):
        load_model(str(pretrained))


def test_the_whole_chain_segments_what_it_learnt(script, pretrained, tmp_path):
    """Bands whose grey tells their class: enough steps must learn them nearly perfectly."""
    draw_pairs(tmp_path / "T", 4)
    draw_pairs(tmp_path / "V", 3, size=(32, 40), seed=5)
    argv = [pretrained, "T/IMG", "T/MASK", "--epochs", 80, "--lr", 3e-3, "--batch_size", 4]
    assert script("finetune.py", *argv, "--augmentation", "light").code == 0
    assert script("predict.py", "segm.pth", "V/IMG", "out").code == 0
    ended = script("evaluate.py", "out/MASK", "V/MASK", "--output", "ev")
    assert ended.code == 0, ended.err

    assert json.loads((tmp_path / "ev/metrics.json").read_text())["mean_dice"] > 0.8


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_agrees_with_the_cpu(tmp_path, model_path, compile):
    names = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, name in enumerate(names):
        grey(name, 30, 40, seed)
    plain = load_predictor(str(model_path), "cpu")
    other = load_predictor(str(model_path), "cuda", MemberOptions(compile=compile))
    for name in names:
        exact, found = plain.probabilities(str(name)), other.probabilities(str(name))
        np.testing.assert_allclose(found, exact, atol=1e-3)
