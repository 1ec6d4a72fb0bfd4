"""predict.py --label_next: the folder of radiographs to correct next."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch as th
from conftest import TINY, digests, draw_pairs
from golden_util import fill_parameters
from PIL import Image

from guided_diffusion.images.masks import read_mask
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.segmentation.categories import generic_categories, load_categories
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.networks.union import join


def make_model(path, resize="pad"):
    config = SegmentationConfig(TINY, ReadingConfig(16, 1, resize), generic_categories(3))
    save_model(str(path), config, fill_parameters(config.build()).state_dict())
    return path


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "segm.pth")


@pytest.fixture
def films(tmp_path):
    draw_pairs(tmp_path / "films", 10)
    return tmp_path / "films" / "IMG"


def rows_of(folder):
    with (folder / "label_next.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refused(ended, *parts):
    assert ended.code == 2, ended.out + ended.err
    line = ended.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_the_folder_holds_what_the_tool_and_the_import_need(script, tmp_path, model, films):
    ended = script("predict.py", model, films, "out", "--label_next", 3)
    assert ended.code == 0, ended.err
    assert "the 3 of 10 radiographs to correct next" in ended.out
    folder = tmp_path / "out/LABEL_NEXT"
    assert sorted(os.listdir(folder)) == [
        *("IMG", "categories.json", "label_next.csv", "label_next.png", "labelme")
    ]
    rows = rows_of(folder)
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert {row["file"] for row in rows} == set(os.listdir(folder / "IMG"))
    assert {row["of"] for row in rows} == {"10"}
    assert all(int(row["uncertainty_rank"]) <= 5 for row in rows)
    assert all(row["distance_to_labelled"] == "" for row in rows)
    assert load_categories(str(folder / "categories.json")) == generic_categories(3)
    for row in rows:
        copy = (folder / "IMG" / row["file"]).read_bytes()
        assert copy == (films / row["file"]).read_bytes()
    # as it is, it comes back as the prediction
    paths = ("out/LABEL_NEXT/labelme", "back", "--images", "out/LABEL_NEXT/IMG")
    table = ("--categories", "out/LABEL_NEXT/categories.json", "--empty", "background")
    ended = script("import_labels.py", *paths, *table)
    assert ended.code == 0, ended.err
    for row in rows:
        name = f"MASK/{row['file']}"
        masks = [read_mask(str(tmp_path / place / name), 3) for place in ("back", "out")]
        assert np.array_equal(*masks)


def test_the_same_command_chooses_the_same(script, tmp_path, model, films):
    for name in ("a", "b"):
        flags = ("--label_next", 3, "--batch_size", 4 if name == "a" else 1)
        assert script("predict.py", model, films, name, *flags).code == 0
    found = [digests(tmp_path / name / "LABEL_NEXT/IMG") for name in ("a", "b")]
    assert found[0] == found[1]


def test_other_formats_and_other_commands_ignore_it(script, tmp_path, model, films):
    flags = ("--label_next", 2, "--export", "coco,nrrd")
    assert script("predict.py", model, films, "out", *flags).code == 0
    folder = tmp_path / "out/LABEL_NEXT"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "IMG",
        "coco",
        "nrrd",
    ]
    listed = json.loads((folder / "coco/annotations.json").read_text())["images"]
    assert {image["file_name"] for image in listed} == set(os.listdir(folder / "IMG"))
    whole = json.loads((tmp_path / "out/EXPORT/coco/annotations.json").read_text())["images"]
    assert len(whole) == 10
    shutil.move(films, tmp_path / "out/films")
    ended = script("predict.py", model, "out", "again")
    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "again/MASK").rglob("*.png"))) == 10


def test_labelled_ones_and_their_patients_do_not_come_again(script, tmp_path, model, films):
    for path in sorted(films.iterdir()):
        number = int(path.stem[1:])
        path.rename(films / f"P{number // 2:03d}-{number % 2}.png")
    labelled = tmp_path / "TRAIN/IMG"
    labelled.mkdir(parents=True)
    shutil.copy(films / "P000-0.png", labelled)
    # the same pixels under the name of another patient
    Image.open(films / "P001-1.png").save(labelled / "P077-0.bmp")
    flags = ("--label_next", 3, "--labelled", "TRAIN")
    ended = script("predict.py", model, films, "out", *flags)
    assert ended.code == 0, ended.err
    rows = rows_of(tmp_path / "out/LABEL_NEXT")
    assert len({row["patient"] for row in rows}) == 3
    assert not {"P000-0.png", "P000-1.png", "P001-1.png"} & {row["file"] for row in rows}
    assert all(float(row["distance_to_labelled"]) > 0 for row in rows)
    ended = script("predict.py", model, films, "more", "--label_next", 5, *flags[2:])
    refused(ended, "--label_next 5: the radiographs are of 4 patients without a labelled one")
    assert not (tmp_path / "more").exists()
    ended = script("predict.py", model, films, "g", "--label_next", 2, "--group", "^(P)")
    refused(ended, "are of 1 patients")


def test_nothing_of_val(script, tmp_path, model, films):
    """Radiographs to measure on are not chosen, but others may be like them."""
    for part, number in (("TRAIN", 0), ("VAL", 1), ("held_out", 2)):
        place = tmp_path / "Split" / part / "IMG"
        place.mkdir(parents=True)
        shutil.copy(films / f"r{number}.png", place)
    flags = ("--label_next", 8, "--labelled", "Split/TRAIN")
    assert script("predict.py", model, films, "out", *flags).code == 0
    files = {row["file"] for row in rows_of(tmp_path / "out/LABEL_NEXT")}
    assert files == {f"r{number}.png" for number in range(2, 10)}
    more = ("--avoid", "Split/VAL", "Split/held_out")
    ended = script("predict.py", model, films, "more", *flags, *more)
    refused(ended, "--label_next 8: the radiographs are of 7 patients without a labelled one")
    ended = script("predict.py", model, films, "more", *flags, "--avoid", "Split/TRAIN")
    refused(ended, "--avoid Split/TRAIN is the folder that --labelled names")


@pytest.mark.parametrize("kind", ["native", "union", "ensemble", "smp"])
def test_every_kind_of_model(script, tmp_path, films, kind):
    path = tmp_path / "segm.pth"
    if kind == "native":
        make_model(path, "native")
    elif kind == "smp":
        pytest.importorskip("segmentation_models_pytorch")
        flags = ("--network", "smp", "--encoder", "resnet18", "--encoder_weights", "none")
        pairs = (films, films.parent / "MASK")
        sizes = ("--image_size", 32, "--epochs", 1, "--weights_save", path)
        assert script("baseline_train.py", *pairs, *flags, *sizes).code == 0
    else:
        config = SegmentationConfig(TINY, ReadingConfig(16, 1), generic_categories(3))
        states = []
        for seed in (0, 1):
            th.manual_seed(seed)
            states.append(config.build().state_dict())
        if kind == "union":
            save_model(str(path), *join([(config, state) for state in states]))
        else:
            for number, state in enumerate(states):
                save_model(str(tmp_path / f"{number}.pth"), config, state)
            path = f"{tmp_path}/0.pth,{tmp_path}/1.pth"
    ended = script("predict.py", path, films, "out", "--label_next", 2)
    assert ended.code == 0, ended.err
    assert len(rows_of(tmp_path / "out/LABEL_NEXT")) == 2


def test_corrections_are_never_overwritten(script, tmp_path, model, films):
    assert script("predict.py", model, films, "out", "--label_next", 1).code == 0
    before = digests(tmp_path / "out")
    refused(
        script("predict.py", model, films, "out", "--label_next", 1),
        *("out/LABEL_NEXT exists already and may hold corrections",),
    )
    assert digests(tmp_path / "out") == before


def test_nothing_half_written(script, tmp_path, model, films, monkeypatch):
    from guided_diffusion.segmentation.inference import label_next

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label_next, "write_picture", fails)
    ended = script("predict.py", model, films, "out", "--label_next", 1)
    refused(ended, "no space left to write out/LABEL_NEXT")
    assert not [name for name in os.listdir(tmp_path / "out") if "LABEL_NEXT" in name]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert script("predict.py", model, films, "out", "--label_next", 1).code == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--label_next", 11), "--label_next 11: the radiographs are of 10 patients"),
        (("--label_next", 1, "--labelled", "nowhere"), "nowhere does not exist"),
        (("--labelled", "films"), "--labelled needs --label_next"),
        (("--avoid", "films"), "--avoid needs --label_next"),
        (("--group", "x"), "--group needs --label_next"),
        (("--label_next", 1, "--no_save"), "leave out --no_save and --interactive"),
        (("--label_next", 1, "--export", "dicomseg"), "is not DICOM"),
    ],
)
def test_wrong_flags(script, tmp_path, model, films, flags, said):
    refused(script("predict.py", model, films, "out", *flags), said)
    assert not (tmp_path / "out").exists()


def test_one_file_for_each_mask(script, model, films):
    ended = script(
        "predict.py", "-m", model, "-i", films / "r0.png", "-o", "x.png", "--label_next", 1
    )
    refused(ended, "--label_next needs a folder as OUTPUT")
