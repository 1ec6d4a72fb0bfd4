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
from guided_diffusion.images.masks import MaskRule, read_mask, write_mask
from guided_diffusion.preparation.mask_repair import examine_mask
from guided_diffusion.preparation.phantoms import make_phantom
from guided_diffusion.preparation.validation import KINDS
from guided_diffusion.segmentation.categories import generic_categories, load_categories
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.visuals.render import palette

TABLE = load_categories()
# those that are planted together; beside 255 as "ignore", white would not be sure to be white
APART = ("undeclared 255", "values with gaps", "thin or stray values")
PLANTED = [kind for kind in KINDS if kind not in APART]


def black_and_white(mask):
    return np.where((mask == 1) | (mask == 3), 255, 0).astype(np.uint8)


def plant(folder):
    """One fault of every kind; returns {kind: file name} and the true masks of repairable ones."""
    img, msk = folder / "TRAIN/IMG", folder / "TRAIN/MASK"
    place = {kind: f"train_{number:04d}.png" for number, kind in enumerate(PLANTED)}

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
    old = msk / f"train_{PLANTED.index('exact duplicate'):04d}.png"
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
    assert set(found) == set(PLANTED)
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
    assert {row["fault"] for row in rows} == set(PLANTED)
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
    assert examine_mask(path, MaskRule(7), TABLE)[1] == []


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("values", ["classes", "black and white"])
def test_interpolated_masks_are_called_blurred_and_repaired(tmp_path, resample, values):
    large, truth = make_phantom(3, (256, 256))[1], make_phantom(3, (80, 80))[1]
    if values == "black and white":
        large, truth = black_and_white(large), black_and_white(truth) // 255
    path = str(tmp_path / "m.png")
    Image.fromarray(large).resize((80, 80), resample).save(path)
    repaired, faults = examine_mask(path, MaskRule(7), TABLE)
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
    repaired, faults = examine_mask(path, MaskRule(3), generic_categories(3))
    assert repaired is None
    assert [fault.kind for fault in faults] == ["value out of range"]


def _labelled(folder, masks):
    """A set of grey noise with these masks."""
    for kind in ("IMG", "MASK"):
        (folder / kind).mkdir(parents=True)
    for number, mask in enumerate(masks):
        noise = np.random.default_rng(number).integers(0, 256, mask.shape, dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"IMG/r{number}.png")
        Image.fromarray(mask).save(folder / f"MASK/r{number}.png")
    return ("--image_dir", folder / "IMG", "--mask_dir", folder / "MASK")


def _fix(prepare, source, output, *flags):
    code, out, error = prepare("--action", "validate", *source, *flags, "--fix_issues",
                               "--output_dir", output)  # fmt: skip
    assert code in (0, 1), error
    return code, out


def _bordered(number=0):
    """Classes 1 and 2 inside a border of 255."""
    mask = np.zeros((40, 40), np.uint8)
    mask[5:20, 5 + number : 20], mask[10:14, 22:34] = 1, 2
    mask[:, 37:] = 255
    return mask


class TestIgnoreLabel:
    def test_undeclared_borders_are_reported_and_left_alone(self, prepare, tmp_path):
        masks = [_bordered(n) for n in range(3)] + [np.where(_bordered() == 255, 255, 0)]
        source = _labelled(tmp_path / "in", [mask.astype(np.uint8) for mask in masks])
        code, out = _fix(prepare, source, tmp_path / "out", "--num_classes", 3)
        assert code == 1
        assert "4  undeclared 255" in out
        assert "--ignore_index 255" in out
        for number, mask in enumerate(masks):
            assert np.array_equal(read_mask(f"{tmp_path}/out/MASK/r{number}.png"), mask)

    @pytest.mark.parametrize("declared", ["flag", "table"])
    def test_declared_borders_are_no_fault(self, prepare, tmp_path, declared):
        source = _labelled(tmp_path / "in", [_bordered(n) for n in range(3)])
        flags = ("--num_classes", 3, "--ignore_index", 255)
        if declared == "table":
            path = tmp_path / "classes.json"
            names = ((0, "background"), (1, "tooth"), (2, "crown"), (255, "unlabelled"))
            plain = [{"index": i, "name": n, "color": [i, 9, 9]} for i, n in names]
            path.write_text(json.dumps([*plain[:3], {**plain[3], "ignore": True}]))
            flags = ("--categories", path)
        code, out, _ = prepare("--action", "validate", *source, *flags)
        assert (code, "0 faults" in out) == (0, True)
        code, out, error = prepare("--action", "analyze", *source, *flags, "--output_dir",
                                   tmp_path / "facts")  # fmt: skip
        assert code == 0, error
        classes = json.loads((tmp_path / "facts/analysis.json").read_text())["classes"]
        assert sum(c["share"] for c in classes.values()) == pytest.approx(1)
        assert len(classes) == 3

    def test_repairs_keep_ignored_pixels(self, prepare, tmp_path):
        large = np.kron(_bordered(), np.ones((2, 2), np.uint8))
        source = _labelled(tmp_path / "in", [_bordered(), _bordered(1)])
        Image.fromarray(large).save(tmp_path / "in/MASK/r0.png")
        code, _ = _fix(prepare, source, tmp_path / "out", "--num_classes", 3, "--ignore_index", 255)
        assert code == 0
        assert np.array_equal(read_mask(f"{tmp_path}/out/MASK/r0.png"), _bordered())


class TestNothingIsGuessed:
    def test_a_class_that_is_thin_everywhere_is_kept(self, prepare, tmp_path):
        mask = np.zeros((40, 40), np.uint8)
        mask[8:30, 8:30] = 1
        mask[9:29, 9:29] = 2  # class 1 is a line of one pixel between 0 and 2
        source = _labelled(tmp_path / "in", [mask, mask.T.copy(), np.roll(mask, 3)])
        code, out = _fix(prepare, source, tmp_path / "out", "--num_classes", 3)
        assert code == 1
        assert "thin or stray values" in out
        assert np.array_equal(read_mask(f"{tmp_path}/out/MASK/r0.png"), mask)

    @pytest.mark.parametrize("white", [128, 255, 65535])
    def test_black_and_white_by_any_white(self, prepare, tmp_path, white):
        truth = _bordered() == 1
        kind = np.uint16 if white > 255 else np.uint8
        source = _labelled(tmp_path / "in", [(truth * white).astype(kind) for _ in range(2)])
        Image.fromarray(np.roll(truth, 9, 0).astype(kind) * kind(white)).save(
            tmp_path / "in/MASK/r1.png"
        )
        code, _, error = prepare("--action", "analyze", *source, "--output_dir", tmp_path / "facts")
        assert code == 0, error
        facts = json.loads((tmp_path / "facts/analysis.json").read_text())
        assert list(facts["classes"].values())[1]["share"] == pytest.approx(truth.mean())
        assert "--binary" in {advice["flag"] for advice in facts["recommended"]}
        _fix(prepare, source, tmp_path / "out")
        assert np.array_equal(read_mask(f"{tmp_path}/out/MASK/r0.png", 2), truth)

    def test_areas_in_colours_of_no_class_are_not_given_to_the_nearest(self, prepare, tmp_path):
        indices = np.where(_bordered() == 255, 0, _bordered())
        colours = palette(TABLE)[indices]
        strange = colours.copy()
        strange[22:30, 4:12] = (250, 90, 3)  # 4 % of the picture
        source = _labelled(tmp_path / "in", [indices.astype(np.uint8)] * 2)
        Image.fromarray(colours).save(tmp_path / "in/MASK/r0.png")
        Image.fromarray(strange).save(tmp_path / "in/MASK/r1.png")
        _, out = _fix(prepare, source, tmp_path / "out", "--num_classes", 7)
        assert "drawn as areas: add them to the class table" in out
        assert np.array_equal(read_mask(f"{tmp_path}/out/MASK/r0.png"), indices)
        assert not (tmp_path / "out/MASK/r1.png").exists()
        _, out = _fix(prepare, source, tmp_path / "untold")
        assert "--categories or --num_classes say of which classes" in out
        assert not (tmp_path / "untold/MASK/r0.png").exists()

    def test_deep_values_around_thin_lines_are_not_cut_to_8_bits(self, prepare, tmp_path):
        mask = np.zeros((40, 40), np.uint16)
        mask[8:30, 8:30] = 1
        mask[9:29, 9:29] = 600
        other = np.where(_bordered() == 2, 2, 0).astype(np.uint8)
        source = _labelled(tmp_path / "in", [other, other])
        Image.fromarray(mask).save(tmp_path / "in/MASK/r0.png")
        _, out = _fix(prepare, source, tmp_path / "out", "--num_classes", 3)
        assert "1  value out of range" in out
        assert not (tmp_path / "out/MASK/r0.png").exists()

    def test_grey_levels_for_display_are_kept(self, prepare, tmp_path):
        mask = np.choose(np.arange(1600).reshape(40, 40) // 400, [0, 85, 170, 255]).astype(np.uint8)
        source = _labelled(tmp_path / "in", [mask, mask.T.copy()])
        code, out = _fix(prepare, source, tmp_path / "out")
        assert code == 1
        assert "2  values with gaps" in out
        assert np.array_equal(read_mask(f"{tmp_path}/out/MASK/r1.png"), mask.T)

    def test_a_class_in_faulty_masks_only_is_named(self, prepare, tmp_path):
        bad = _bordered()
        bad[bad == 255], bad[0, 0] = 3, 77
        source = _labelled(
            tmp_path / "in", [bad, np.where(_bordered() == 1, 1, 0).astype(np.uint8)]
        )
        _, out = _fix(prepare, source, tmp_path / "out", "--num_classes", 4)
        assert "classes 2, 3 are only in masks that were left out" in out
