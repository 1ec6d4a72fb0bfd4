"""prepare_data.py --action select: which radiographs to label."""

import csv
import shutil

import numpy as np
import pytest
from conftest import digests
from PIL import Image
from sampling_util import CLASSES, CLASSIFIER, NETWORK, write_shapes, write_trained

from guided_diffusion.segmentation.selection import pool
from guided_diffusion.segmentation.selection.features import Encoder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("select")
    write_shapes(folder / "images", count=12, size=64)
    write_trained(folder / "network")
    write_trained(folder / "classifier", CLASSIFIER, kind="classifier", classes=CLASSES)
    return folder


@pytest.fixture
def select(prepare, workshop):
    """Run the action: (exit code, stdout, stderr)."""

    def run(out, *flags, images=workshop / "images", network="network"):
        return prepare(
            *("--action", "select", "--image_dir", images, "--output_dir", out),
            *("--checkpoint", workshop / network / "ema_0.9_000010.pt", *flags),
        )

    return run


def rows_of(folder):
    with open(folder / "selection.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_copies_of_what_differs(select, workshop, tmp_path):
    code, said, error = select(tmp_path / "out", "--k", 2)
    assert code == 0, error
    assert "2 of 12 radiographs to label" in said
    rows = rows_of(tmp_path / "out")
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert {row["file"][:4] for row in rows} == {"ball", "bar_"}
    assert sum(int(row["stands_for"]) for row in rows) == 12
    assert float(rows[1]["mean_distance_so_far"]) < float(rows[0]["mean_distance_so_far"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("IMG", "selection.csv", "selection.png")
    ]
    for row in rows:
        copy = tmp_path / "out" / "IMG" / row["file"]
        assert copy.read_bytes() == (workshop / "images" / row["file"]).read_bytes()
    with Image.open(tmp_path / "out" / "selection.png") as picture:
        assert picture.width > 9 * 128


def test_the_same_command_chooses_the_same(select, tmp_path):
    for name in "ab":
        assert select(tmp_path / name, "--k", 3)[0] == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_patient_is_chosen_once(select, workshop, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((workshop / "images").iterdir())):
        shutil.copy(path, images / f"P{number // 4:03d}-{number % 4}.png")
    code, _, error = select(tmp_path / "out", "--k", 3, images=images)
    assert code == 0, error
    assert "3 patients of 12 images" in error
    patients = [row["patient"] for row in rows_of(tmp_path / "out")]
    assert sorted(patients) == ["P000-0", "P001-0", "P002-0"]
    code, _, error = select(tmp_path / "more", "--k", 4, images=images)
    assert code == 2
    assert "--k 4: the radiographs are of 3 patients" in error
    assert not (tmp_path / "more").exists()
    code, _, error = select(tmp_path / "one", "--k", 2, "--group", "^(P)", images=images)
    assert code == 2
    assert "are of 1 patients" in error


def test_copies_and_broken_files(select, workshop, tmp_path):
    images = shutil.copytree(workshop / "images", tmp_path / "images")
    pixels = np.asarray(Image.open(images / "bar_001.png"))
    Image.fromarray(pixels).save(images / "same.bmp")
    broken = images / "broken.png"
    broken.write_bytes((images / "bar_003.png").read_bytes()[:60])
    code, _, error = select(tmp_path / "out", "--k", 2, images=images)
    assert code == 2
    assert "broken.png" in error
    assert not (tmp_path / "out").exists()
    code, said, error = select(
        tmp_path / "out", "--k", 12, "--skip_bad_images", True, images=images
    )
    assert code == 0, error
    assert "12 of 12 radiographs" in said
    assert f"skipped: {broken}" in error
    assert "same.bmp has the same pixels as" in error


def test_it_resumes(select, workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PART", 3)
    assert select(tmp_path / "whole", "--k", 3)[0] == 0
    seen = []
    encode = Encoder.__call__

    def stops(self, images):
        seen.append(len(images))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(Encoder, "__call__", stops)
    code, _, error = select(tmp_path / "out", "--k", 3)
    assert (code, error.splitlines()[-1]) == (130, "error: interrupted")
    others = shutil.copytree(workshop / "images", tmp_path / "others")
    (others / "bar_001.png").unlink()
    code, _, error = select(tmp_path / "out", "--k", 3, images=others)
    assert code == 2
    assert "the beginning of another selection (other names, images)" in error
    assert select(tmp_path / "out", "--k", 3)[0] == 0
    assert seen == [3] * 5
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    code, _, error = select(tmp_path / "out", "--k", 3)
    assert code == 2
    assert "is not empty, and nothing in it is overwritten" in error


def test_a_network_with_classes(select, workshop, tmp_path):
    model = NETWORK.__class__(**{**vars(NETWORK), "class_cond": True, "num_classes": 2})
    write_trained(workshop / "conditional", model, classes=CLASSES)
    code, _, error = select(tmp_path / "out", "--k", 2, network="conditional")
    assert code == 0, error
    assert "taken with the embedding of the mean of its 2 classes" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--checkpoint", ""), "--checkpoint is missing"),
        (("--checkpoint", "nowhere.pt"), "nowhere.pt"),
        (("--image_dir", "nowhere"), "--image-dir nowhere: a folder of radiographs"),
        (("--output_dir", ""), "--output-dir is needed"),
        (("--seed", 1), "no effect with --action select: --seed"),
        (("--k", 0), "--k 0"),
    ],
)
def test_wrong_flags(select, tmp_path, flags, said):
    code, _, error = select(tmp_path / "out", *flags)
    assert code == 2
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_other_networks_and_empty_folders(select, tmp_path):
    code, _, error = select(tmp_path / "out", network="classifier")
    assert code == 2
    assert "is a network of kind classifier, not diffusion" in error
    (tmp_path / "empty").mkdir()
    code, _, error = select(tmp_path / "out", images=tmp_path / "empty")
    assert code == 2
    assert "no images in" in error
    code, _, error = select(tmp_path / "empty" / "out", images=tmp_path / "empty")
    assert code == 2
    assert "lies in" in error
    assert not (tmp_path / "out").exists()
