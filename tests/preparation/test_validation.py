import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import PHANTOM_SIZE as SIZE
from conftest import digests
from PIL import Image

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.masks import read_mask, write_mask
from guided_diffusion.preparation.mask_repair import examine_mask
from guided_diffusion.preparation.phantoms import make_phantom
from guided_diffusion.preparation.validation import KINDS
from guided_diffusion.segmentation.categories import generic_categories, load_categories
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.visuals.render import palette

TABLE = load_categories()


def black_and_white(mask):
    return np.where((mask == 1) | (mask == 3), 255, 0).astype(np.uint8)


def plant(folder):
    """One fault of every kind; returns {kind: file name} and the true masks of repairable ones."""
    img, msk = folder / "TRAIN/IMG", folder / "TRAIN/MASK"
    place = {kind: f"train_{number:04d}.png" for number, kind in enumerate(KINDS)}

    def mask_of(kind):
        return read_mask(str(msk / place[kind]))

    def save(kind, values, where=msk, name=None, **options):
        Image.fromarray(values).save(where / (name or place[kind]), **options)

    image_file = img / place["unreadable image"]
    image_file.write_bytes(image_file.read_bytes()[:700])
    (msk / place["unreadable mask"]).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (msk / place["image without mask"]).unlink()
    (img / place["mask without image"]).unlink()
    picture = img / place["several of one name"]
    Image.open(picture).save(picture.with_suffix(".bmp"))
    kind = "sizes differ"
    save(kind, np.kron(mask_of(kind), np.ones((2, 2), np.uint8)))
    kind = "value out of range"
    values = mask_of(kind)
    values[5:9, 5:9] = 9
    save(kind, values)
    kind = "black-and-white mask"
    truth = {kind: black_and_white(mask_of(kind)) // 255}
    save(kind, black_and_white(mask_of(kind)))
    kind = "colour mask"
    truth[kind] = mask_of(kind)
    save(kind, palette(TABLE)[mask_of(kind)])
    kind = "blurred mask"
    image, truth[kind] = make_phantom(77, SIZE)
    large = Image.fromarray(make_phantom(77, (4 * SIZE[0], 4 * SIZE[1]))[1])
    save(kind, image, where=img)
    save(kind, np.asarray(large.resize(SIZE[::-1], Image.Resampling.BILINEAR)))
    kind = "lossy mask"
    truth[kind] = black_and_white(mask_of(kind)) // 255
    encoded = io.BytesIO()
    Image.fromarray(black_and_white(mask_of(kind))).save(encoded, "JPEG", quality=85)
    (msk / place[kind]).unlink()
    (msk / place[kind]).with_suffix(".jpg").write_bytes(encoded.getvalue())
    save("empty mask", np.zeros(SIZE, np.uint8))
    save("blank image", np.full(SIZE, 77, np.uint8), where=img)
    # The same pixels twice, under other names and in another format.
    other = img / "train_0025.png"
    (img / place["exact duplicate"]).unlink()
    place["exact duplicate"] = "train_0025_again.bmp"
    Image.open(other).save(img / place["exact duplicate"])
    old = msk / f"train_{list(KINDS).index('exact duplicate'):04d}.png"
    old.rename(msk / "train_0025_again.png")
    # The same picture, brightened and compressed as JPEG.
    encoded = io.BytesIO()
    bright = np.asarray(Image.open(img / "train_0026.png")) * 0.8 + 30
    Image.fromarray(bright.astype(np.uint8)).save(encoded, "JPEG", quality=60)
    place["near duplicate"] = "train_0027.png"
    save("near duplicate", np.asarray(Image.open(encoded)), where=img)
    # Leaks: pictures of VAL in TRAIN.
    val = folder / "VAL"
    for kind, source in (
        ("exact duplicate across splits", "val_0001.png"),
        ("near duplicate across splits", "val_0002.png"),
    ):
        shutil.copyfile(val / "MASK" / source, msk / place[kind])
        pixels = np.asarray(Image.open(val / "IMG" / source))
        save(kind, pixels if "exact" in kind else pixels // 2 + 9, where=img)
    image, mask = make_phantom(99, (80, 96))
    save("unusual size", image, where=img)
    save("unusual size", mask)
    return place, truth


@pytest.fixture
def faulty(phantoms, tmp_path):
    folder = tmp_path / "faulty"
    shutil.copytree(phantoms, folder)
    return folder, *plant(folder)


def faults_in(path):
    found = {}
    for fault in json.loads(path.read_text()):
        found.setdefault(fault["kind"], set()).add(Path(fault["path"]).name)
    return found


def test_a_clean_set_has_no_faults(prepare, phantoms):
    code, out, _ = prepare("--action", "validate", "--source-dir", phantoms, "--num-classes", 7)
    assert code == 0
    assert "36 images checked, 0 faults" in out


def test_every_planted_fault_is_found(prepare, faulty, tmp_path):
    folder, place, _ = faulty
    before = digests(folder)
    code, out, _ = prepare(
        *("--action", "validate", "--source_dir", folder, "--num_classes", 7),
        *("--output-dir", tmp_path / "report"),
    )
    assert code == 1
    found = faults_in(tmp_path / "report/faults.json")
    assert set(found) == set(KINDS)
    for kind, name in place.items():
        stems = {Path(path).stem for path in found[kind]}
        assert stems == {Path(name).stem}, kind
        assert kind in out
    assert digests(folder) == before


def test_repairable_faults_are_repaired_in_a_copy(prepare, faulty, tmp_path):
    folder, place, truth = faulty
    before = digests(folder)
    copy = tmp_path / "copy"
    arguments = ("--action", "validate", "--num-classes", 7)
    code, out, _ = prepare(*arguments, "--source-dir", folder, "--fix-issues", "--output-dir", copy)
    assert code == 1  # empty masks, near duplicates and unusual sizes are left to people
    assert "3 faults were not fixed" in out
    assert digests(folder) == before

    prepare(*arguments, "--source-dir", copy, "--output-dir", tmp_path / "again")
    left = faults_in(tmp_path / "again/faults.json")
    assert set(left) == {"empty mask", "near duplicate", "unusual size"}

    # Files without faults are there, byte for byte.
    masks = {
        Path(mask).stem: mask
        for _, _, mask in pair_files(f"{copy}/TRAIN/IMG", f"{copy}/TRAIN/MASK")
    }
    for stem in ("train_0020", "train_0025", "train_0029"):
        for kind in ("IMG", "MASK"):
            kept, original = (f / "TRAIN" / kind / f"{stem}.png" for f in (copy, folder))
            assert kept.read_bytes() == original.read_bytes()
    for stem in ("val_0001", "val_0002"):
        assert (copy / "VAL/IMG" / f"{stem}.png").exists()
    gone = {
        "unreadable image",
        "unreadable mask",
        "mask without image",
        "several of one name",
        "value out of range",
        "blank image",
        "exact duplicate",
        "exact duplicate across splits",
        "near duplicate across splits",
    }
    for kind in gone:
        assert Path(place[kind]).stem not in masks, kind
    assert (copy / "unlabelled" / place["image without mask"]).exists()
    for kind in ("black-and-white mask", "colour mask"):
        assert np.array_equal(read_mask(masks[Path(place[kind]).stem]), truth[kind]), kind
    for kind, least in (("blurred mask", 0.8), ("lossy mask", 0.99)):
        repaired = read_mask(masks[Path(place[kind]).stem], 7)
        agreement = dice_iou(confusion_matrix(repaired, truth[kind], 7))
        assert agreement.mean_dice() > least, kind
    size = Path(place["sizes differ"]).stem
    original = read_mask(str(folder / "TRAIN/MASK" / f"{size}.png"))[::2, ::2]
    assert np.array_equal(read_mask(masks[size]), original)

    with open(copy / "fixes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["fault"] for row in rows} == set(KINDS)
    undone = {row["fault"] for row in rows if row["done"] == "nothing"}
    assert undone == set(left)


def test_the_copy_never_overwrites_anything(prepare, phantoms, tmp_path):
    flags = ("--action", "validate", "--source-dir", phantoms, "--fix-issues")
    code, _, error = prepare(*flags)
    assert code == 2
    assert "--output-dir is needed" in error
    code, _, error = prepare(*flags, "--output-dir", phantoms / "new")
    assert code == 2
    assert "lies in" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for action in (flags, ("--action", "create-sample")):
        code, _, error = prepare(*action, "--output-dir", tmp_path / "full")
        assert code == 2
        assert "is not empty" in error
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]


def test_unlabelled_folders_can_be_validated(prepare, phantoms, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(phantoms / "TRAIN/IMG", folder)
    shutil.copyfile(folder / "train_0003.png", folder / "twin.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    copy = tmp_path / "copy"
    code, out, _ = prepare(
        *("--action", "validate", "--image-dir", folder, "--fix-issues", "--output-dir", copy)
    )
    assert code == 0
    assert "32 images checked, 2 faults" in out
    assert len(list((copy / "IMG").iterdir())) == 30
    assert not (copy / "MASK").exists()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_hard_edges_are_not_called_blurred(tmp_path, size, seed):
    path = str(tmp_path / "m.png")
    write_mask(path, make_phantom(seed, (size, size))[1])
    assert examine_mask(path, 7, TABLE)[1] == []


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("values", ["classes", "black and white"])
def test_interpolated_masks_are_called_blurred_and_repaired(tmp_path, resample, values):
    large, truth = make_phantom(3, (256, 256))[1], make_phantom(3, (80, 80))[1]
    if values == "black and white":
        large, truth = black_and_white(large), black_and_white(truth) // 255
    path = str(tmp_path / "m.png")
    Image.fromarray(large).resize((80, 80), resample).save(path)
    repaired, faults = examine_mask(path, 7, TABLE)
    assert [fault.kind for fault in faults] == ["blurred mask"]
    after = dice_iou(confusion_matrix(repaired, truth, 7)).mean_dice()
    if values == "black and white":
        assert after > 0.95
    else:  # what lies between pulp and dentine may be caries: some of it stays wrong
        before = dice_iou(confusion_matrix(read_mask(path), truth, 7)).mean_dice()
        assert after > max(0.84, before + 0.05)


def test_grey_areas_are_not_merged_into_black_and_white(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[5:30, 5:30], mask[10:14, 10:14] = 255, 128
    path = str(tmp_path / "m.png")
    Image.fromarray(mask).save(path)
    repaired, faults = examine_mask(path, 3, generic_categories(3))
    assert repaired is None
    assert [fault.kind for fault in faults] == ["value out of range"]
