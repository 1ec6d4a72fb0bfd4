"""import_labels.py --into: corrected annotations join TRAIN and keep apart from VAL."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import digests, run_script
from images_util import write_dicom
from import_util import SIZE, SQUARE, labelme, square, write_json
from PIL import Image

from guided_diffusion.images.masks import read_mask
from guided_diffusion.runtime.storage import together
from guided_diffusion.runtime.storage.lock_file import RunLock

TABLE = [
    {"index": 0, "name": "background", "color": [0, 0, 0]},
    {"index": 1, "name": "bone", "color": [255, 0, 0]},
    {"index": 2, "name": "tooth", "color": [0, 255, 0]},
]
SMALL = [[4, 5], [8, 5], [8, 9], [4, 9]]


def noise(path, seed):
    """A picture unlike any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def labelled(folder, *names, seed=0):
    for number, name in enumerate(names):
        noise(folder / "IMG" / f"{name}.png", 100 * seed + number)
        mask = folder / "MASK" / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(square().astype(np.uint8)).save(mask)


def draw(folder, name, *shapes):
    content = labelme(*(shapes or [("tooth", SQUARE)]), image=name)
    return write_json(folder / f"{name.rpartition('.')[0]}.json", content)


@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path / "Split/TRAIN", "anna_1", "bert_1", seed=1)
    labelled(tmp_path / "Split/VAL", "carl_1", "dora_1", seed=2)
    write_json(tmp_path / "Split/TRAIN/categories.json", TABLE)
    return tmp_path / "Split"


@pytest.fixture
def drawn(tmp_path):
    """Annotations of a new radiograph."""
    noise(tmp_path / "drawn/emil_1.png", 7)
    draw(tmp_path / "drawn", "emil_1.png")
    return tmp_path / "drawn"


def join(*flags, into="Split/TRAIN"):
    return run_script("import_labels.py", "drawn", "--into", into, *flags)


def refused(*flags, parts, into="Split/TRAIN"):
    before = digests(Path("Split"))
    ended = join(*flags, into=into)
    assert ended.code == 2, ended.out + ended.err
    (line,) = [one for one in ended.err.splitlines() if one.startswith("error: ")]
    for part in parts:
        assert part in line, line
    assert digests(Path("Split")) == before
    assert not Path("Split/TRAIN/.partial").exists()


def test_new_images_join_with_the_indices_of_the_folder(split, drawn):
    before = digests(split)
    ended = join()
    assert ended.code == 0, ended.err
    assert "Split/TRAIN has 1 new images and 0 corrected masks; kept apart from 2" in ended.out
    mask = read_mask(str(split / "TRAIN/MASK/emil_1.png"), 3)
    assert np.array_equal(mask, 2 * square())
    copy = split / "TRAIN/IMG/emil_1.png"
    assert copy.read_bytes() == (drawn / "emil_1.png").read_bytes()
    after = digests(split)
    added = {*after} - {*before}
    assert added == {f"TRAIN/{n}" for n in ("IMG/emil_1.png", "MASK/emil_1.png", "import.json")}
    assert {name: after[name] for name in before} == before
    noise(drawn / "fred_1.png", 8)
    draw(drawn, "fred_1.png")
    (drawn / "emil_1.json").unlink()
    assert join().code == 0
    names = {
        one["name"] for one in json.loads((split / "TRAIN/import_2.json").read_text())["images"]
    }
    assert names == {"fred_1"}


def test_masks_that_are_there_are_replaced_only_on_request(split, drawn):
    shutil.copy(split / "TRAIN/IMG/anna_1.png", drawn)
    draw(drawn, "anna_1.png", ("bone", SMALL))
    refused(parts=("drawn/anna_1.png is in Split/TRAIN already", "anna_1.png", "--replace"))
    image = (split / "TRAIN/IMG/anna_1.png").read_bytes()
    ended = join("--replace")
    assert ended.code == 0, ended.err
    assert "1 new images and 1 corrected masks" in ended.out
    mask = read_mask(str(split / "TRAIN/MASK/anna_1.png"), 3)
    assert np.array_equal(mask, square(points=SMALL))
    assert (split / "TRAIN/IMG/anna_1.png").read_bytes() == image


def test_the_picture_of_a_dicom_file_is_that_file(split, drawn):
    """LabelMe shows a PNG of 8 bits: the mask is that of the DICOM file, which stays."""
    values = np.random.default_rng(5).integers(0, 4096, SIZE, dtype=np.uint16)
    values = np.sort(values.ravel()).reshape(SIZE)
    write_dicom(split / "TRAIN/IMG", values, name="gina_1.dcm", BitsStored=12, HighBit=11)
    shutil.copy(split / "TRAIN/MASK/anna_1.png", split / "TRAIN/MASK/gina_1.png")
    shutil.rmtree(drawn)
    drawn.mkdir()
    Image.fromarray((values // 16).astype(np.uint8)).save(drawn / "gina_1.png")
    draw(drawn, "gina_1.png", ("bone", SMALL))
    ended = join("--replace")
    assert ended.code == 0, ended.err
    assert not (split / "TRAIN/IMG/gina_1.png").exists()
    mask = read_mask(str(split / "TRAIN/MASK/gina_1.png"), 3)
    assert np.array_equal(mask, square(points=SMALL))


def test_the_same_picture_under_another_name_is_that_picture(split, drawn):
    shutil.copy(split / "TRAIN/IMG/anna_1.png", drawn / "other.png")
    draw(drawn, "other.png", ("bone", SMALL))
    refused(parts=("drawn/other.png is in Split/TRAIN already, as", "anna_1.png"))
    assert join("--replace").code == 0
    assert not (split / "TRAIN/IMG/other.png").exists()
    mask = read_mask(str(split / "TRAIN/MASK/anna_1.png"), 3)
    assert np.array_equal(mask, square(points=SMALL))


def test_another_picture_of_the_same_name_is_refused(split, drawn):
    noise(drawn / "anna_1.png", 55)
    draw(drawn, "anna_1.png")
    refused("--replace", parts=("drawn/anna_1.png and", "TRAIN/IMG/anna_1.png", "different pict"))


class TestNothingOfVal:
    def test_by_name(self, split, drawn):
        noise(drawn / "carl_1.png", 9)
        draw(drawn, "carl_1.png")
        refused(parts=("drawn/carl_1.png has the name of Split/VAL/IMG/carl_1.png",))

    def test_by_content(self, split, drawn):
        Image.open(split / "VAL/IMG/dora_1.png").save(drawn / "x.bmp")
        draw(drawn, "x.bmp")
        refused(parts=("drawn/x.bmp is the same picture as Split/VAL/IMG/dora_1.png",))

    def test_the_same_picture_saved_differently(self, split, drawn):
        values = np.asarray(Image.open(split / "VAL/IMG/dora_1.png"))
        Image.fromarray((values * 0.8 + 10).astype(np.uint8)).save(drawn / "x.png")
        draw(drawn, "x.png")
        refused(parts=("drawn/x.png is the same picture as Split/VAL/IMG/dora_1.png",))

    def test_by_patient(self, split, drawn):
        for number in range(4):
            labelled(split / "TRAIN", f"patient_{number}_l", seed=10 + number)
        labelled(split / "VAL", "patient_77_l", seed=20)
        noise(drawn / "patient_77_r.png", 77)
        draw(drawn, "patient_77_r.png")
        parts = ("drawn/patient_77_r.png and Split/VAL/IMG/patient_77_l.png are of one patient",)
        refused(parts=parts)
        assert join("--group", r"(.*)").code == 0

    def test_by_the_folder_of_a_patient(self, split, drawn, tmp_path):
        """Images of the same name in a folder for each patient, as predict.py hands them over."""
        shutil.rmtree(drawn)
        for number in range(4):
            labelled(split / "TRAIN", f"film_{number}/a", f"film_{number}/b", seed=10 + number)
        labelled(split / "VAL", "film_8/a", "film_8/b", seed=20)
        for seed, name in enumerate(("film_6/a", "film_6/b", "film_7/a", "film_7/b"), 50):
            noise(tmp_path / f"IMG/{name}.png", seed)
            draw(drawn / name[:6], f"{name[7:]}.png")
        ended = join("--images", "IMG")
        assert ended.code == 0, ended.err
        for name in ("film_6/a", "film_7/a"):
            copy = split / f"TRAIN/IMG/{name}.png"
            assert copy.read_bytes() == (tmp_path / f"IMG/{name}.png").read_bytes()
        shutil.rmtree(drawn)
        noise(tmp_path / "IMG/film_8/c.png", 70)
        draw(drawn / "film_8", "c.png")
        parts = ("IMG/film_8/c.png and Split/VAL/IMG/film_8/", "are of one patient")
        refused("--images", "IMG", parts=parts)

    def test_by_patient_as_a_rule_says(self, split, drawn):
        refused("--group", r"_(\d)", parts=("drawn/emil_1.png and", "are of one patient"))

    def test_in_folders_that_are_named(self, split, drawn, tmp_path):
        labelled(tmp_path / "held_out", "emil_1", seed=30)
        refused("--avoid", "held_out", parts=("emil_1.png has the name of held_out/IMG/emil_1",))
        refused("--avoid", "Split/TRAIN", parts=("is the folder that --into names",))
        refused("--avoid", "nowhere", parts=("nowhere does not exist",))


class TestClasses:
    def test_a_class_that_the_folder_lacks(self, split, drawn):
        draw(drawn, "emil_1.png", ("caries", SQUARE))
        refused(parts=("TRAIN/categories.json has no class 'caries'", "--map"))
        assert join("--map", "caries=tooth").code == 0

    def test_another_table_is_refused(self, split, drawn, tmp_path):
        other = [TABLE[0], {**TABLE[1], "name": "tooth"}, {**TABLE[2], "name": "bone"}]
        write_json(tmp_path / "other.json", other)
        parts = ("class 1 is 'bone' in Split/TRAIN/categories.json and 'tooth' in other.json",)
        refused("--categories", "other.json", parts=parts)
        write_json(tmp_path / "short.json", TABLE[:2])
        refused(
            "--categories",
            "short.json",
            parts=("TRAIN/categories.json has 3 classes and short.json 2",),
        )
        write_json(tmp_path / "same.json", [*TABLE[:2], {**TABLE[2], "name": "Tooth"}])
        assert join("--categories", "same.json").code == 0

    def test_a_folder_without_a_table(self, split, drawn):
        shutil.move(split / "TRAIN/categories.json", "table.json")
        refused(parts=("Split/TRAIN has no categories.json", "--categories"))
        assert join("--categories", "table.json").code == 0
        assert json.loads((split / "TRAIN/categories.json").read_text()) == TABLE

    def test_a_table_beside_the_folder(self, split, drawn):
        shutil.move(split / "TRAIN/categories.json", split / "categories.json")
        assert join().code == 0
        assert not (split / "TRAIN/categories.json").exists()
        mask = read_mask(str(split / "TRAIN/MASK/emil_1.png"), 3)
        assert np.array_equal(mask, 2 * square())

    def test_masks_of_other_classes(self, split, drawn):
        Image.fromarray(np.full(SIZE, 9, np.uint8)).save(split / "TRAIN/MASK/bert_1.png")
        refused(parts=("TRAIN/MASK/bert_1.png", "9"))

    def test_pixels_without_a_label_need_an_entry(self, split, drawn):
        refused("--unlabelled", "ignore", parts=("drawn/emil_1.png", "no entry", '"ignore": true'))


def test_all_or_nothing(split, drawn, monkeypatch):
    shutil.copy(split / "TRAIN/IMG/anna_1.png", drawn)
    draw(drawn, "anna_1.png", ("bone", SMALL))
    noise(drawn / "sub/gert_1.png", 11)
    draw(drawn / "sub", "gert_1.png")
    before, replace = digests(split), os.replace
    for limit in range(4):
        moved = []

        def fails(source, target, limit=limit, moved=moved):
            if ".partial" in str(source) and ".partial" not in str(target):
                if not str(source).endswith(".old"):
                    moved.append(target)
                if len(moved) > limit and not str(source).endswith(".old"):
                    raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(together.os, "replace", fails)
        ended = join("--replace")
        monkeypatch.undo()
        monkeypatch.chdir(split.parent)
        assert ended.code == 2
        assert "no space left to write Split/TRAIN" in ended.err
        assert digests(split) == before
        assert not (split / "TRAIN/IMG/sub").exists()
    assert join("--replace").code == 0


def test_a_folder_that_another_command_fills(split, drawn):
    lock = RunLock(str(split / "TRAIN/run.lock"))
    lock.acquire()
    ended = join()
    lock.release()
    assert ended.code == 2
    assert "Split/TRAIN is in use by process" in ended.err
    assert join().code == 0
    assert not (split / "TRAIN/run.lock").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("out", "--into", "Split/TRAIN"), "give either OUTPUT (out) or --into"),
        ((), "output, or --into"),
        (("out", "--replace"), "--replace needs --into"),
        (("out", "--avoid", "Split/VAL"), "--avoid needs --into"),
        (("out", "--group", "x"), "--group needs --into"),
        (("--into", "nowhere"), "--into nowhere is not a folder"),
        (("--into", "Split"), "expected one folder of images"),
    ],
)
def test_wrong_flags(split, drawn, flags, said):
    ended = run_script("import_labels.py", "drawn", *flags)
    assert ended.code == 2
    assert said in ended.err
    assert not (split.parent / "out").exists()
