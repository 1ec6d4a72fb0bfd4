"""Nobody names a class table twice: importing and predicting put it beside the masks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from finetuning_util import folders

from guided_diffusion.images.masks import write_mask
from guided_diffusion.runtime.storage.files import save_json
from guided_diffusion.segmentation.categories import (
    ClassTable,
    generic_categories,
    load_categories,
    table_of_masks,
    to_plain,
)
from guided_diffusion.segmentation.model_file import load_model

NAMES = ("background", "left lung", "right lung")
TABLE = ClassTable(replace(c, name=name) for c, name in zip(generic_categories(3), NAMES))


def write_table(folder, table=TABLE):
    folder.mkdir(parents=True, exist_ok=True)
    save_json(str(folder / "categories.json"), to_plain(table))


@pytest.mark.parametrize(
    ("masks", "place", "found"),
    [
        ("Split/TRAIN/MASK", "Split/TRAIN/MASK", True),
        ("Split/TRAIN/MASK", "Split/TRAIN", True),
        ("Split/TRAIN/MASK/", "Split", True),
        ("Split/TRAIN/MASK/*.png", "Split", True),
        ("results/MASK", "results", True),
        ("results/MASK", ".", False),
        ("MASK", ".", True),
        ("Split/TRAIN/MASK", ".", False),
    ],
)
def test_where_it_is_found(tmp_path, monkeypatch, masks, place, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / masks.replace("*.png", "")).mkdir(parents=True)
    write_table(tmp_path / place)
    path = table_of_masks(masks)
    assert bool(path) == found
    assert not found or load_categories(path) == TABLE


def test_from_the_labels_to_the_figures(script, pretrained, split, tmp_path):
    """Fine-tune, predict and evaluate without --categories."""
    write_table(split)
    arguments = ("finetune.py", pretrained, *folders(split), "--epochs", 1)
    ended = script(*arguments)
    assert ended.code == 0, ended.err
    assert tuple(c.name for c in load_model("segm.pth")[1].categories) == NAMES
    images, masks = split / "VAL/IMG", split / "VAL/MASK"
    assert script("predict.py", "segm.pth", images, "results").code == 0
    assert load_categories("results/categories.json") == TABLE
    (split / "categories.json").unlink()
    ended = script("evaluate.py", "results/MASK", masks, "--output", "found")
    assert ended.code == 0, ended.err
    assert tuple(json.loads((tmp_path / "found/metrics.json").read_text())["per_class"]) == NAMES
    assert "by the highest value" not in ended.out + ended.err

    write_table(tmp_path / "results", generic_categories(3))
    ended = script("predict.py", "segm.pth", images, "results")
    assert (ended.code, "class 1 is 'class 1' in results" in ended.err) == (2, True)
    # masks of more classes than the table has
    write_table(split, ClassTable(TABLE[:2]))
    ended = script(*arguments, "--weights_save", "other.pth")
    assert ended.code == 2
    assert "lists 2 classes, but the masks hold the value 2" in ended.err
    assert script(*arguments, "--weights_save", "other.pth", "--out_channels", 3).code == 0


@pytest.fixture
def results(tmp_path):
    """Predictions and true masks, each pixel right, class 2 being nowhere."""
    for folder in ("results/MASK", "true/MASK"):
        write_mask(str(tmp_path / folder / "a.png"), np.array([[0, 1], [1, 1]], np.uint8))
    return tmp_path


@pytest.mark.parametrize(
    ("predicted", "true", "names"),
    [
        (TABLE, None, NAMES),
        (None, TABLE, NAMES),
        (generic_categories(3), TABLE, NAMES),
        (TABLE, generic_categories(3), NAMES),
        (generic_categories(3), None, ("background", "class 1", "class 2")),
        (None, None, ("background", "class 1")),
    ],
)
def test_the_table_of_an_evaluation(script, results, predicted, true, names):
    for folder, table in (("results", predicted), ("true", true)):
        if table is not None:
            write_table(results / folder, table)
    ended = script("evaluate.py", "results/MASK", "true/MASK", "--output", "out")
    assert ended.code == 0, ended.err
    assert tuple(json.loads((results / "out/metrics.json").read_text())["per_class"]) == names


@pytest.mark.parametrize(
    "other",
    [
        ClassTable(replace(c, name=c.name[::-1]) for c in TABLE),
        generic_categories(4),
    ],
)
def test_masks_of_different_classes_are_not_compared(script, results, other):
    write_table(results / "results")
    write_table(results / "true", other)
    ended = script("evaluate.py", "results/MASK", "true/MASK", "--output", "out")
    assert (ended.code, "with --categories" in ended.err) == (2, True), ended.err
    assert not (results / "out").exists()
    flags = ("--categories", "results/categories.json")
    assert script("evaluate.py", "results/MASK", "true/MASK", *flags).code == 0
    assert script("evaluate.py", "results/MASK", "true/MASK", "--binary", "True").code == 0


def test_values_that_the_true_masks_ignore_are_not_counted(script, results):
    write_mask(str(results / "true/MASK/a.png"), np.array([[0, 255], [1, 1]], np.uint8))
    ignored = replace(TABLE[2], index=255, name="unlabelled", color=(1, 2, 3))
    write_table(results / "results")
    write_table(results / "true", ClassTable(TABLE, [ignored]))
    ended = script("evaluate.py", "results/MASK", "true/MASK", "--output", "out")
    assert ended.code == 0, ended.err
    metrics = json.loads((results / "out/metrics.json").read_text())
    assert metrics["per_class"]["left lung"]["predicted_pixels"] == 2


def test_exported_labels_have_its_names(script, results):
    write_table(results / "results")
    (results / "IMG").mkdir()
    write_mask(str(results / "IMG/a.png"), np.zeros((2, 2), np.uint8))
    ended = script("export_labels.py", "results", "IMG", "OUT", "--format", "coco")
    assert ended.code == 0, ended.err
    text = "".join(path.read_text() for path in (results / "OUT").rglob("*.json"))
    assert "left lung" in text
