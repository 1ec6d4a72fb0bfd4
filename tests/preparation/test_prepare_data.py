import csv
import hashlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from PIL import Image

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image, read_mask, write_mask
from guided_diffusion.preparation import layouts
from guided_diffusion.preparation.analysis import bit_depth
from guided_diffusion.preparation.division import divide, read_groups
from guided_diffusion.preparation.faults import KINDS
from guided_diffusion.preparation.mask_repair import examine_mask
from guided_diffusion.preparation.phantoms import make_phantom, write_dataset
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories, load_categories
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.visuals.render import palette

SCRIPT = ROOT / "tools" / "prepare_data.py"
TABLE = load_categories()
SIZE = (72, 72)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the tool as if from a shell: (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A faultless data set: 30 phantoms in TRAIN, 6 in VAL."""
    folder = tmp_path_factory.mktemp("clean")
    write_dataset(str(folder), 0, 30, 6, size=SIZE, seed=1)
    return folder / "Split"


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def black_and_white(mask):
    return np.where((mask == 1) | (mask == 3), 255, 0).astype(np.uint8)


def plant(folder):
    """One fault of every kind; returns {kind: name of the file}, and truth of what is mendable."""
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
    # The same picture, brightened and through a JPEG.
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
def faulty(clean, tmp_path):
    folder = tmp_path / "faulty"
    shutil.copytree(clean, folder)
    return folder, *plant(folder)


def faults_in(path):
    found = {}
    for fault in json.loads(path.read_text()):
        found.setdefault(fault["kind"], set()).add(Path(fault["path"]).name)
    return found


def test_a_clean_set_has_no_faults(run, clean):
    code, out, _ = run("--action", "validate", "--source-dir", clean, "--num-classes", 7)
    assert code == 0
    assert "36 images checked, 0 faults" in out


def test_every_planted_fault_is_found(run, faulty, tmp_path):
    folder, place, _ = faulty
    before = digests(folder)
    code, out, _ = run(
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


def test_what_can_be_mended_is_mended_in_a_copy(run, faulty, tmp_path):
    folder, place, truth = faulty
    before = digests(folder)
    copy = tmp_path / "copy"
    arguments = ("--action", "validate", "--num-classes", 7)
    code, out, _ = run(*arguments, "--source-dir", folder, "--fix-issues", "--output-dir", copy)
    assert code == 1  # an empty mask, a near duplicate and an unusual size are for people
    assert "3 faults are as they were" in out
    assert digests(folder) == before

    run(*arguments, "--source-dir", copy, "--output-dir", tmp_path / "again")
    left = faults_in(tmp_path / "again/faults.json")
    assert set(left) == {"empty mask", "near duplicate", "unusual size"}

    # Whatever was not faulty is there, byte for byte.
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
        mended = read_mask(masks[Path(place[kind]).stem], 7)
        agreement = dice_iou(confusion_matrix(mended, truth[kind], 7))
        assert agreement.mean_dice() > least, kind
    size = Path(place["sizes differ"]).stem
    original = read_mask(str(folder / "TRAIN/MASK" / f"{size}.png"))[::2, ::2]
    assert np.array_equal(read_mask(masks[size]), original)

    with open(copy / "fixes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["fault"] for row in rows} == set(KINDS)
    undone = {row["fault"] for row in rows if row["done"] == "nothing"}
    assert undone == set(left)


def test_the_copy_never_touches_what_exists(run, clean, tmp_path):
    flags = ("--action", "validate", "--source-dir", clean, "--fix-issues")
    code, _, error = run(*flags)
    assert code == 2
    assert "--output-dir is needed" in error
    code, _, error = run(*flags, "--output-dir", clean / "new")
    assert code == 2
    assert "lies in" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for action in (flags, ("--action", "create-sample")):
        code, _, error = run(*action, "--output-dir", tmp_path / "full")
        assert code == 2
        assert "is not empty" in error
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]


def test_unlabelled_folders_can_be_validated(run, clean, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(clean / "TRAIN/IMG", folder)
    shutil.copyfile(folder / "train_0003.png", folder / "twin.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    copy = tmp_path / "copy"
    code, out, _ = run(
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
def test_interpolated_masks_are_called_blurred_and_mended(tmp_path, resample, values):
    large, truth = make_phantom(3, (256, 256))[1], make_phantom(3, (80, 80))[1]
    if values == "black and white":
        large, truth = black_and_white(large), black_and_white(truth) // 255
    path = str(tmp_path / "m.png")
    Image.fromarray(large).resize((80, 80), resample).save(path)
    mended, faults = examine_mask(path, 7, TABLE)
    assert [fault.kind for fault in faults] == ["blurred mask"]
    after = dice_iou(confusion_matrix(mended, truth, 7)).mean_dice()
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
    mended, faults = examine_mask(path, 3, generic_categories(3))
    assert mended is None
    assert [fault.kind for fault in faults] == ["value out of range"]


LAYOUTS = {
    "one": {"": ("IMG", "MASK")},
    "plain": {"": ("imgs", "masks")},
    "images": {"": ("images", "masks")},
    "split": {
        "TRAIN": ("Split/TRAIN/IMG", "Split/TRAIN/MASK"),
        "VAL": ("Split/VAL/IMG", "Split/VAL/MASK"),
    },
    "train first": {
        "TRAIN": ("train/images", "train/masks"),
        "VAL": ("val/images", "val/masks"),
        "TEST": ("test/images", "test/masks"),
    },
    "images first": {"TRAIN": ("images/train", "masks/train"), "VAL": ("images/val", "masks/val")},
    "all": {
        "TRAIN": ("all/train/imgs", "all/train/masks"),
        "VAL": ("all/val/imgs", "all/val/masks"),
        "TEST": ("all/test/imgs", "all/test/masks"),
    },
    "side by side": {"TRAIN": ("all/train", "all/train"), "VAL": ("all/val", "all/val")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    expected = set()
    for split, (image_dir, mask_dir) in LAYOUTS[layout].items():
        for number in range(2):
            stem = f"{split.lower() or 'film'}{number}"
            mask = np.full((4, 4), number, np.uint8)
            suffix = "_mask" if image_dir == mask_dir or number else ""
            write_mask(f"{tmp_path}/{image_dir}/{stem}.png", mask)
            write_mask(f"{tmp_path}/{mask_dir}/{stem}{suffix}.tif", mask)
            expected.add((split, stem, number))
    items, unpaired = layouts.list_items(layouts.sources(str(tmp_path)))
    assert not unpaired
    assert {(i.split, i.stem, int(read_mask(i.mask)[0, 0])) for i in items} == expected


def test_places_that_hold_no_data_set(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for flags, says in (
        (("--source-dir", tmp_path), "no layout"),
        (("--source-dir", tmp_path / "nowhere"), "not a folder"),
        ((), "say where"),
        (("--mask-dir", tmp_path), "needs the --image-dir"),
        (("--image-dir", tmp_path, "--source-dir", tmp_path), "not both"),
        (("--image-dir", tmp_path / "empty", "--mask-dir", tmp_path / "empty"), "no images"),
    ):
        code, _, error = run("--action", "validate", *flags)
        assert code == 2
        assert says in error
        assert error.count("\n") == 1


def test_flags_that_do_nothing_are_refused(run, clean):
    code, _, error = run("--action", "analyze", "--source-dir", clean, "--train-images", 3)
    assert code == 2
    assert "--train_images" in error
    code, _, error = run("--action", "anlyze", "--source-dir", clean)
    assert code == 2
    assert "create-sample" in error


def organized(folder):
    """{split: stems} of what organize wrote."""
    return {
        split: {
            stem
            for stem, _, _ in pair_files(
                f"{folder}/Split/{split}/IMG", f"{folder}/Split/{split}/MASK"
            )
        }
        for split in ("TRAIN", "VAL")
    }


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """24 films of 8 patients, masks named *_mask; class 2 in one patient's films alone."""
    folder = tmp_path_factory.mktemp("patients")
    for number in range(24):
        stem = f"p{number % 8}_film{number}"
        mask = np.zeros((8, 8), np.uint8)
        mask[2:5, 2:5] = 2 if number == 5 else 1
        write_mask(f"{folder}/imgs/{stem}.png", mask + np.uint8(number))
        write_mask(f"{folder}/masks/{stem}_mask.tif", mask)
    return folder


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["regex", "csv"])
def test_organize_never_parts_a_patient(run, patients, tmp_path, seed, rule):
    group = r"p(\d)_"
    if rule == "csv":
        group = tmp_path / "patients.csv"
        lines = ["name,patient"]
        lines += [f"p{n % 8}_film{n}{'.png' if n % 2 else ''},{n % 8}" for n in range(24)]
        group.write_text("\n".join(lines))
    code, _, _ = run(
        *("--action", "organize", "--source-dir", patients, "--output-dir", tmp_path / "out"),
        *("--train-split", 0.6, "--group", group, "--seed", seed),
    )
    assert code == 0
    sides = organized(tmp_path / "out")
    assert len(sides["TRAIN"] | sides["VAL"]) == 24
    of_patients = {side: {stem[:2] for stem in stems} for side, stems in sides.items()}
    assert not of_patients["TRAIN"] & of_patients["VAL"]
    assert len(sides["TRAIN"]) == 12  # 14 wanted, patients have three films
    assert "p5" in of_patients["TRAIN"]  # its class 2 is nowhere else
    with open(tmp_path / "out/Split/split.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if row["split"] == "TRAIN"} == sides["TRAIN"]
    assert rows["p3_film11"]["group"] == "3"
    original = patients / "imgs/p3_film11.png"
    side = rows["p3_film11"]["split"]
    assert (tmp_path / f"out/Split/{side}/IMG/p3_film11.png").read_bytes() == original.read_bytes()


def test_organize_few_labels(run, patients, tmp_path):
    draws = set()
    for seed in range(3):
        out = tmp_path / str(seed)
        run(
            *("--action", "organize", "--image_dir", patients / "imgs"),
            *("--mask_dir", patients / "masks", "--output_dir", out),
            *("--train_images", 3, "--seed", seed),
        )
        sides = organized(out)
        assert len(sides["TRAIN"]) == 3
        assert len(sides["VAL"]) == 21
        assert "p5_film5" in sides["TRAIN"]
        draws.add(frozenset(sides["TRAIN"]))
        again = tmp_path / f"{seed} again"
        run(
            *("--action", "organize", "--source-dir", patients, "--output-dir", again),
            *("--train-images", 3, "--seed", seed),
        )
        assert digests(again) == digests(out)
    assert len(draws) > 1


def test_organize_keeps_a_split_unless_told_and_test_always(run, tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for number in range(count):
            mask = np.full((4, 4), number % 2, np.uint8)
            for kind in ("images", "masks"):
                write_mask(f"{tmp_path}/in/{split}/{kind}/{split}{number}.png", mask)
    flags = ("--action", "organize", "--source-dir", tmp_path / "in", "--output-dir")
    code, out, _ = run(*flags, tmp_path / "kept")
    assert code == 0
    assert "4 TRAIN, 2 VAL, 3 TEST" in out
    assert organized(tmp_path / "kept")["VAL"] == {"val0", "val1"}
    code, out, _ = run(*flags, tmp_path / "new", "--train-split", 0.5)
    assert "3 TRAIN, 3 VAL, 3 TEST" in out
    stems = {p.stem for p in (tmp_path / "new/Split/TEST/IMG").iterdir()}
    assert stems == {"test0", "test1", "test2"}


def test_organize_refuses_what_it_cannot_do(run, patients, clean, tmp_path):
    flags = ("--action", "organize", "--source-dir", patients, "--output-dir", tmp_path / "out")
    for more, says in (
        (("--train-images", 24), "leave one side empty"),
        (("--train-images", 2, "--group", r"p(\d)_"), "no group has as few as 2"),
        (("--group", "patient"), "matches nothing in 24 of 24"),
        (("--group", "("), "not a regular expression"),
        (("--group", "nowhere.csv"), "nowhere.csv does not exist"),
        (("--group", "p"), "one group"),
        (("--train-split", 1.5), "a share between 0 and 1"),
        (("--train-split", 0.5, "--train-images", 2), "not both"),
    ):
        code, _, error = run(*flags, *more)
        assert code == 2
        assert says in error
        assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    shutil.copytree(patients, broken)
    (broken / "imgs/extra.png").write_bytes(b"")
    code, _, error = run(*flags[:3], broken, *flags[4:])
    assert code == 2
    assert "extra.png" in error
    assert "--action validate" in error


@settings(max_examples=60)
@given(st.data())
def test_division_keeps_groups_and_covers_classes(data):
    count = data.draw(st.integers(2, 30))
    groups = [str(data.draw(st.integers(0, 12))) for _ in range(count)]
    classes = np.zeros((count, 4), bool)
    classes[:, 0] = True
    for row in classes:
        row[1:] = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    wanted = data.draw(st.integers(1, count - 1))
    try:
        train = divide(groups, classes, wanted, seed=data.draw(st.integers(0, 99)))
    except UserError:
        smallest = min(groups.count(group) for group in groups)
        assert len(set(groups)) < 2 or smallest > wanted
        return
    assert 1 <= train.sum() <= wanted
    sides = [{g for g, t in zip(groups, train) if t == side} for side in (True, False)]
    assert not sides[0] & sides[1]
    assert sides[1]
    if len(set(groups)) == count:  # every image its own patient
        assert train.sum() == wanted
        if wanted >= 4:
            assert np.array_equal(classes[train].any(axis=0), classes.any(axis=0))


@pytest.mark.parametrize("seed", range(3))
def test_division_finds_the_few_images_that_count(seed):
    groups = [str(number) for number in range(1000)]
    classes = np.zeros((1000, 3), bool)
    classes[:, 0], classes[123, 1], classes[456, 2] = True, True, True
    train = divide(groups, classes, 10, seed)
    assert train[123]
    assert train[456]
    # Ten images hold class 1, ten class 2, one of them both: with room for one it is that.
    classes = np.zeros((19, 3), bool)
    classes[:10, 1], classes[9:, 2] = True, True
    assert np.flatnonzero(divide(groups[:19], classes, 1, seed)).tolist() == [9]


def test_groups_of_names():
    names = ["ann_1", "ann_2", "bob/3"]
    assert read_groups(names, "") == names
    assert read_groups(names, "^[a-z]+") == ["ann", "ann", "bob"]
    assert read_groups(names, r"(\d)") == ["1", "2", "3"]


def test_analyze(run, clean, tmp_path):
    code, out, _ = run(
        "--action", "analyze", "--source-dir", clean, "--output-dir", tmp_path / "report"
    )
    assert code == 0
    report = json.loads((tmp_path / "report/analysis.json").read_text())
    assert report["images"] == 36
    assert report["splits"] == {"TRAIN": 30, "VAL": 6}
    assert report["sizes"] == {"72x72": 36}
    assert report["bits"] == {"8": 36}
    assert report["grey_images"] == 36
    masks = np.stack([read_mask(str(p)) for p in sorted(clean.rglob("MASK/*.png"))])
    for category in TABLE:
        entry = report["classes"][category.name]
        assert entry["share"] == pytest.approx((masks == category.index).mean())
        assert entry["images"] == (masks == category.index).any(axis=(1, 2)).sum()
    films = np.stack([read_image(str(p)) for p in sorted(clean.rglob("IMG/*.png"))]) / 255
    means = films.mean(axis=(1, 2))
    assert report["grey_levels"]["mean"][::2] == pytest.approx(
        [means.min(), np.median(means), means.max()], abs=1e-5
    )
    advice = {line["flag"]: line["value"] for line in report["recommended"]}
    assert advice["--resize"] == "crop"
    assert advice["--in_channels"] == "1"
    assert all(line["why"] for line in report["recommended"])
    assert "caries" in out
    with Image.open(tmp_path / "report/analysis.png") as picture:
        assert picture.width > 500


def test_analyze_deep_wide_and_coloured_images(run, tmp_path):
    rng = np.random.default_rng(0)
    ramp = np.linspace(100, 4000, 40 * 80).reshape(40, 80).astype(np.uint16)
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(ramp + np.uint16(number)).save(folder / f"deep{number}.png")
    colour = rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "colour.jpg")
    (folder / "broken.png").write_bytes(b"no")
    code, out, _ = run("--action", "analyze", "--image-dir", folder, "--output-dir", tmp_path)
    assert code == 0
    assert "1 unreadable" in out
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert report["bits"] == {"8": 1, "16": 3}
    advice = {line["flag"]: line["value"] for line in report["recommended"]}
    assert advice["--intensity"] == "percentile"  # 12 of 16 bits are used
    assert advice["--resize"] == "pad"
    assert advice["--in_channels"] == "3"
    assert "classes" not in report
    assert bit_depth(str(folder / "deep0.png")) == 16


@pytest.mark.parametrize("action", ["create-sample", "create_sample"])
def test_create_sample(run, tmp_path, action):
    code, out, _ = run(
        *("--action", action, "--output-dir", tmp_path / "s", "--num-samples", 5),
        *("--image-size", 32, "--seed", 4),
    )
    assert code == 0
    assert "4 in Split/TRAIN, 1 in Split/VAL" in out
    assert len(list((tmp_path / "s/unlabelled").iterdir())) == 5
    ((_, image, mask),) = pair_files(f"{tmp_path}/s/Split/VAL/IMG", f"{tmp_path}/s/Split/VAL/MASK")
    assert read_image(image).shape == read_mask(mask, 7).shape == (32, 32)
    code, _, error = run("--action", action, "--output-dir", tmp_path / "t", "--num-samples", 1)
    assert code == 2
    assert "--num_samples 1" in error
