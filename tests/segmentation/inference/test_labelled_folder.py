"""Radiographs and masks join a labelled folder; no radiograph is replaced, no mask unasked."""

import os
import unicodedata

import numpy as np
import pytest
from conftest import digests
from images_util import write_dicom
from PIL import Image
from serve_util import write

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.masks import read_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import files
from guided_diffusion.segmentation.categories import generic_categories, load_categories, to_plain
from guided_diffusion.segmentation.inference.labelled_folder import AlreadySaved, LabelledFolder

MASK = np.eye(30, 40, dtype=np.uint8)


@pytest.fixture
def labelled(tmp_path):
    return LabelledFolder(str(tmp_path / "out"), generic_categories(3))


@pytest.fixture
def upload(tmp_path):
    """The path of a radiograph's content."""

    def create(grey=90, name="content.png"):
        return str(write(tmp_path / name, grey=grey))

    return create


def pairs(labelled):
    return [pair[0] for pair in pair_files(f"{labelled.path}/IMG", f"{labelled.path}/MASK")]


def test_a_pair_as_fine_tuning_reads_it(labelled, upload, tmp_path):
    assert not (tmp_path / "out").exists()
    place = labelled.save("anna, 1.png", upload(), MASK)
    assert str(place) == "IMG/anna, 1.png and MASK/anna, 1.png"
    content = (tmp_path / "content.png").read_bytes()
    assert (tmp_path / "out/IMG/anna, 1.png").read_bytes() == content
    assert np.array_equal(read_mask(str(tmp_path / "out/MASK/anna, 1.png"), 3), MASK)
    assert load_categories(str(tmp_path / "out/categories.json")) == labelled.categories
    assert pairs(labelled) == ["anna, 1"]


def test_names_as_people_have_them(labelled, upload, tmp_path):
    names = [unicodedata.normalize("NFD", "müller.png"), 'x "y" #1% $2.png', "b.c.PNG"]
    for grey, name in enumerate(names):
        labelled.save(name, upload(grey), MASK)
    assert sorted(os.listdir(tmp_path / "out/IMG")) == sorted(names)
    dicom = write_dicom(tmp_path, MASK, name="1.2.840.7")
    labelled.save("1.2.840.7", str(dicom), MASK)
    assert len(pairs(labelled)) == 4


@pytest.mark.parametrize(
    "name",
    [
        *("", "..", "../a.png", "a/b.png", "/etc/a.png", "..\\a.png", "a\0.png", "a\n.png"),
        *(".a.png", "a.txt", "a", "1.2.3", "DICOMDIR", "x" * 300 + ".png"),
    ],
)
def test_names_that_cannot_be_kept(labelled, upload, tmp_path, name):
    with pytest.raises(UserError) as caught:
        labelled.check(labelled.place(name, upload()))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        labelled.save(name, upload(), MASK)
    assert list(digests(tmp_path)) == ["content.png"]


def test_a_mask_is_replaced_only_if_someone_said_so(labelled, upload, tmp_path):
    labelled.save("a.png", upload(), MASK)
    before = digests(tmp_path)
    with pytest.raises(AlreadySaved, match=r"MASK/a\.png was saved before"):
        labelled.save("a.png", upload(), MASK * 2)
    assert digests(tmp_path) == before
    labelled.save("a.png", upload(), MASK * 2, replace=True)
    assert np.array_equal(read_mask(str(tmp_path / "out/MASK/a.png"), 3), MASK * 2)
    assert pairs(labelled) == ["a"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "A.png"])
def test_another_radiograph_of_a_name_is_refused(labelled, upload, tmp_path, name):
    labelled.save("a.png", upload(), MASK)
    before = digests(tmp_path / "out")
    for replace in (False, True):
        with pytest.raises(UserError, match=r"IMG/a.png is another radiograph .* rename"):
            labelled.save(name, upload(91), MASK, replace)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["a.png", "a_mask.png", "a.tif"])
def test_masks_of_other_tools(labelled, upload, tmp_path, name):
    (tmp_path / "out/MASK").mkdir(parents=True)
    Image.fromarray(MASK).save(tmp_path / "out/MASK" / name)
    with pytest.raises(UserError, match=f"MASK/{name} is there without a radiograph"):
        labelled.save("a.png", upload(), MASK)
    (tmp_path / "out/IMG").mkdir()
    os.link(upload(), tmp_path / "out/IMG/a.png")
    with pytest.raises(AlreadySaved, match=f"MASK/{name}"):
        labelled.save("a.png", upload(), MASK)
    assert labelled.save("a.png", upload(), MASK * 2, replace=True).mask == name
    assert np.array_equal(read_mask(str(tmp_path / "out/MASK" / name), 3), MASK * 2)
    assert pairs(labelled) == ["a"]


def test_the_mask_of_a_similar_name_is_another(labelled, upload):
    """a_seg.png with its own mask, beside a.png."""
    labelled.save("a_seg.png", upload(), MASK)
    labelled.save("a.png", upload(1), MASK * 2)
    labelled.save("a.png", upload(1), MASK, replace=True)
    assert pairs(labelled) == ["a", "a_seg"]


def test_several_files_of_one_name(labelled, upload, tmp_path):
    labelled.save("a.png", upload(), MASK)
    Image.fromarray(MASK).save(tmp_path / "out/MASK/a_gt.png")
    with pytest.raises(UserError, match=r"MASK/a.png, MASK/a_gt.png do not pair"):
        labelled.save("a.png", upload(), MASK, replace=True)


def test_both_or_neither(labelled, upload, tmp_path, monkeypatch):
    def fail(source, target):
        if os.path.basename(os.path.dirname(target)) == "MASK":
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(UserError, match="no space left"):
            labelled.save("a.png", upload(), MASK)
    assert list(digests(tmp_path / "out")) == ["categories.json"]
    labelled.save("a.png", upload(), MASK)
    assert pairs(labelled) == ["a"]


def test_class_tables_must_agree(tmp_path):
    files.save_json(str(tmp_path / "categories.json"), to_plain(generic_categories(4)))
    with pytest.raises(UserError, match=r"categories.json has 4 classes and the model 3: "):
        LabelledFolder(str(tmp_path), generic_categories(3))
    table = generic_categories(4).ignoring(255)
    files.save_json(str(tmp_path / "categories.json"), to_plain(table))
    assert LabelledFolder(str(tmp_path), generic_categories(4)).categories.entries[-1].index == 255


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "IMG").write_text("in the way")
    for path in (tmp_path, tmp_path / "IMG"):
        with pytest.raises(UserError, match="a file is in the way of a folder"):
            LabelledFolder(str(path), generic_categories(3))
    with pytest.raises(UserError, match="a folder of this machine"):
        LabelledFolder("gs://bucket/out", generic_categories(3))
