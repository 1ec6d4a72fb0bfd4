"""Pixels without a label count nowhere: in no loss, score, statistic or picture of classes."""

import json
import shutil

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.masks import read_mask
from guided_diffusion.segmentation.categories import ClassTable, from_plain, generic_categories
from guided_diffusion.segmentation.categories import to_plain as plain_of
from guided_diffusion.segmentation.model_file import load_model

NAMES = ("background", "tooth", "crown")
PLAIN = [{"index": i, "name": n, "color": [i, 9, 9]} for i, n in enumerate(NAMES)]
UNLABELLED = {"index": 200, "name": "unlabelled", "color": [7, 7, 7], "ignore": True}


@pytest.fixture
def bordered(split):
    """The split with 4 columns without a label (200) in every mask."""
    for path in split.glob("*/MASK/*.png"):
        mask = np.array(Image.open(path))
        mask[:, -4:] = 200
        Image.fromarray(mask).save(path)
    return split


@pytest.fixture(params=["flag", "table"])
def declared(request, tmp_path):
    """Flags that declare the value 200, in either way."""
    if request.param == "flag":
        return ("--ignore_index", 200)
    (tmp_path / "classes.json").write_text(json.dumps([*PLAIN, UNLABELLED]))
    return ("--categories", tmp_path / "classes.json")


def _folders(split):
    return [split / part / kind for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK")]


def test_fine_tuning_leaves_them_out_and_evaluation_knows_from_the_model(
    script, pretrained, bordered, declared, tmp_path
):
    refused = script("finetune.py", pretrained, *_folders(bordered), "--out_channels", 3)
    assert refused.code == 2
    assert "200" in refused.err
    trained = script("finetune.py", pretrained, *_folders(bordered), *declared, "--epochs", 1)
    assert trained.code == 0, trained.err
    assert "3 classes" in trained.err
    config = load_model(str(tmp_path / "segm.pth"))[1]
    assert [category.index for category in config.categories.ignored] == [200]

    arguments = (*_folders(bordered)[2:], "--model", "segm.pth", "-o", "out", "--surface")
    ended = script("evaluate.py", *arguments)
    assert ended.code == 0, ended.err
    masks = [read_mask(str(path)) for path in (bordered / "VAL/MASK").iterdir()]
    figures = json.loads((tmp_path / "out/metrics.json").read_text())
    assert figures["pixels"] == sum(int((mask != 200).sum()) for mask in masks)
    assert figures["classes"] == [c.name for c in config.categories]


def test_what_lies_there_changes_nothing(script, pretrained, bordered, tmp_path):
    weights = []
    for value in (200, 255):
        for path in bordered.glob("*/MASK/*.png"):
            mask = np.array(Image.open(path))
            mask[:, -4:] = value
            Image.fromarray(mask).save(path)
        argv = (*_folders(bordered), "--epochs", 2, "--weights_save", f"{value}.pth")
        ended = script("finetune.py", pretrained, *argv, "--ignore_index", value)
        assert ended.code == 0, ended.err
        weights.append(load_model(str(tmp_path / f"{value}.pth"))[0].state_dict())
    for name, values in weights[0].items():
        assert th.equal(values, weights[1][name])


def test_other_kinds_of_training_take_the_flag(script, pretrained, bordered):
    folders = _folders(bordered)
    flags = ("--ignore_index", 200, "--steps", 1)
    ended = script(
        "baseline_train.py", *folders, "--network", "features", "--checkpoint", pretrained,
        "--feature_blocks", "1,3", *flags,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    size = ("--image_size", 16, "--num_channels", 32, "--channel_mult", "1,2")
    ended = script(
        "mask_diffusion_train.py", *folders, "--batch_size", 2, "--weights_save", "m.pth",
        *flags, *size, "--diffusion_steps", 20, "--save_interval", 1, "--sample_interval", 0,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    train = bordered / "TRAIN"
    guided = (
        "image_train.py", "--data_dir", train / "IMG", "--segmentation_guided", "True",
        "--seg_dir", train / "MASK", "--num_segmentation_classes", 3, *size, "--batch_size", 2,
        "--max_steps", 1, "--save_interval", 1, "--sample_interval", 0,
    )  # fmt: skip
    assert script(*guided).code == 2
    ended = script(*guided, "--ignore_index", 200)
    assert ended.code == 0, ended.err


def test_masks_agree_with_themselves(script, bordered, tmp_path):
    masks = bordered / "TRAIN/MASK"
    shutil.copytree(masks, tmp_path / "same")
    ended = script("evaluate.py", masks, "same", "--ignore_index", 200, "-o", "out")
    assert ended.code == 0, ended.err
    figures = json.loads((tmp_path / "out/metrics.json").read_text())
    assert figures["mean_dice"] == 1
    assert len(figures["classes"]) == 3
    joined = script("evaluate.py", masks, "same", "--ignore_index", 200, "--binary", "True")
    assert joined.code == 0, joined.err


def test_colours_of_the_table_become_the_ignored_value(script, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps([*PLAIN, UNLABELLED]))
    colours = np.array([[[1, 9, 9], [7, 7, 7], [2, 9, 9], [90, 90, 90]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "c.png")
    flags = ("--categories", "classes.json", "--format", "png")
    assert script("rgb2tif.py", "c.png", "i.png", *flags).code == 2
    for unknown, expected in (("background", 0), ("ignore", 200)):
        ended = script("rgb2tif.py", "c.png", "i.png", *flags, "--unknown", unknown)
        assert ended.code == 0, ended.err
        assert read_mask(str(tmp_path / "i.png")).tolist() == [[1, 200, 2, expected]]
    ended = script("rgb2tif.py", "c.png", "i.png", "--unknown", "ignore")
    assert ended.code == 2
    assert '"ignore": true' in ended.err


def test_tables_keep_them_apart_from_classes():
    table = from_plain([*PLAIN, UNLABELLED])
    assert [c.name for c in table] == list(NAMES)
    assert table.mask_rule().ignore == (200,)
    assert from_plain(plain_of(table)) == table
    assert from_plain(plain_of(table)).ignored == table.ignored
    assert table.ignoring(200).ignored == table.ignored
    assert generic_categories(3).ignoring(-1).ignored == ()
    assert ClassTable(table).ignoring(IGNORE).mask_rule().ignore == (IGNORE,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"index": 2, "name": "x"}, "ignored index 2"),
        ({"index": 256}, "ignored index 256"),
        ({"ignore": "yes"}, '"ignore" is true or false'),
        ({"name": "Tooth"}, "share the name"),
        ({"color": [1, 9, 9]}, "share the colour"),
        ({"ignore": False}, "indices are"),
    ],
)
def test_faulty_tables_are_refused(change, says):
    with pytest.raises(Exception, match=says):
        from_plain([*PLAIN, {**UNLABELLED, **change}])
