"""Guided images against their masks, as a model sees them that reads grey levels as classes."""

import json
from functools import partial

import numpy as np
import pytest
from conftest import draw_pairs
from PIL import Image

from guided_diffusion.images.image_io import read_image
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.evaluation import faithfulness
from guided_diffusion.segmentation.evaluation.faithfulness import (
    Failures,
    GuidedImages,
    compare_with_masks,
)
from guided_diffusion.segmentation.prediction import Prediction

GREYS = (40, 125, 210)  # of draw_pairs


class ByGrey:
    """Sees the class whose grey is nearest."""

    categories = generic_categories(3)

    def read(self, path):
        return read_image(path, 1)

    def start(self, images):
        def finish(image):
            distance = abs(image.astype(float) - np.array(GREYS)[:, None, None])
            return Prediction(np.exp(-distance), np.zeros(image.shape))

        return [partial(finish, image) for image in images]


@pytest.fixture
def folder(tmp_path):
    """Four images that show their masks, but r1, in which class 2 is class 1."""
    draw_pairs(tmp_path, 4, (16, 16))
    path = tmp_path / "IMG" / "r1.png"
    image = np.asarray(Image.open(path))
    Image.fromarray(np.where(image > 170, GREYS[1], image).astype(np.uint8)).save(path)
    return tmp_path


def test_where_each_class_fails(folder):
    result = compare_with_masks(ByGrey(), GuidedImages.in_folder(str(folder)))
    masks = [np.asarray(Image.open(folder / "MASK" / f"r{i}.png")) for i in range(4)]
    asked = [sum(int((mask == c).sum()) for mask in masks) for c in range(3)]
    lost = int((masks[1] == 2).sum())
    one, two = result.per_class()
    assert two["missing"] == pytest.approx(lost / asked[2])
    assert two["instead"] == one["class"]
    assert (two["worst"], two["worst_dice"]) == ("r1", 0)
    assert two["added"] == one["missing"] == 0
    assert one["added"] == pytest.approx(lost / asked[1])
    assert result.worst()[0] == "r1"
    assert result.evaluation.per_image()[0].mean_dice() == 1
    assert any(f"{lost / asked[2]:.1%} of the asked pixels missing" in x for x in result.lines())


def test_a_class_that_was_left_open_is_no_mistake(folder):
    for path in (folder / "MASK").iterdir():  # as image_sample.py --ablate_classes 1 writes them
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 1, 0, mask).astype(np.uint8)).save(path)
    settings = {"images": {"ablate_classes": [1]}}
    (folder / "sampling.json").write_text(json.dumps(settings))
    source = GuidedImages.in_folder(str(folder))
    assert source.left_open == (1,)
    result = compare_with_masks(ByGrey(), source)
    assert [row["class"] for row in result.per_class()] == [ByGrey.categories[2].name]
    means = {
        r.name: s.mean_dice()
        for r, s in zip(result.evaluation.results, result.evaluation.per_image())
    }
    assert means == {"r0": 1, "r1": 0, "r2": 1, "r3": 1}


def test_failures_are_counted_where_they_are():
    failures = Failures(2)
    true = np.array([[1, 1, 0]], np.uint8)
    failures.add(np.array([[1, 0, 1]], np.uint8), true)
    failures.add(np.array([[1, 1, 1]], np.uint8), true)
    assert failures.missing[1].tolist() == [[0, 1, 0]]
    assert failures.added[1].tolist() == [[0, 0, 2]]
    assert failures.asked[1].tolist() == [[2, 2, 0]]
    missing, added = (failures.picture(generic_categories(2))[y, [5, 30, 55]] for y in (5, 50))
    assert missing.tolist() == [0, 128, 0]
    assert added.tolist() == [0, 0, 255]
    failures.add(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))
    assert failures.picture(generic_categories(2)) is None


def test_the_command_writes_tables_and_pictures(script, folder, monkeypatch):
    monkeypatch.setattr(faithfulness, "load_predictor", lambda *_, precision: ByGrey())
    done = script("evaluate_guidance.py", "segm.pth", folder)
    assert done.code == 0, done.err
    assert "mean of the foreground" in done.out
    names = {path.name for path in (folder / "faithfulness").iterdir()}
    assert names == {
        *("metrics.json", "per_image.csv", "confusion.png"),
        *("where.png", "worst.png"),
    }
    columns, rows = 4, 4
    worst = Image.open(folder / "faithfulness" / "worst.png")
    assert worst.size == (columns * 18 + 2, rows * 18 + 2)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no folders IMG and MASK"):
        GuidedImages.in_folder(str(tmp_path))
