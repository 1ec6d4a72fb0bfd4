import csv
import shutil

import numpy as np
import pytest
from conftest import digests
from hypothesis import given, settings
from hypothesis import strategies as st
from images_util import write_dicom

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.masks import write_mask
from guided_diffusion.preparation.organize import divide, read_groups
from guided_diffusion.runtime.errors import UserError


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
    """24 films of 8 patients, masks named *_mask; class 2 in the films of one patient only."""
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
def test_organize_never_splits_a_patient(prepare, patients, tmp_path, seed, rule):
    group = r"p(\d)_"
    if rule == "csv":
        group = tmp_path / "patients.csv"
        lines = ["name,patient"]
        lines += [f"p{n % 8}_film{n}{'.png' if n % 2 else ''},{n % 8}" for n in range(24)]
        group.write_text("\n".join(lines))
    code, _, _ = prepare(
        *("--action", "organize", "--source-dir", patients, "--output-dir", tmp_path / "out"),
        *("--train-split", 0.6, "--group", group, "--seed", seed),
    )
    assert code == 0
    sides = organized(tmp_path / "out")
    assert len(sides["TRAIN"] | sides["VAL"]) == 24
    of_patients = {side: {stem[:2] for stem in stems} for side, stems in sides.items()}
    assert not of_patients["TRAIN"] & of_patients["VAL"]
    assert len(sides["TRAIN"]) == 12  # of the 14 requested: patients have three films
    assert "p5" in of_patients["TRAIN"]  # no other patient has class 2
    with open(tmp_path / "out/Split/split.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if row["split"] == "TRAIN"} == sides["TRAIN"]
    assert rows["p3_film11"]["group"] == "3"
    original = patients / "imgs/p3_film11.png"
    side = rows["p3_film11"]["split"]
    assert (tmp_path / f"out/Split/{side}/IMG/p3_film11.png").read_bytes() == original.read_bytes()


def test_organize_few_labels(prepare, patients, tmp_path):
    draws = set()
    for seed in range(3):
        out = tmp_path / str(seed)
        prepare(
            *("--action", "organize", "--image_dir", patients / "imgs"),
            *("--mask_dir", patients / "masks", "--output_dir", out),
            *("--train_images", 6, "--seed", seed),
        )
        sides = organized(out)
        assert len(sides["TRAIN"]) == 6
        assert len(sides["VAL"]) == 18
        assert "p5_film5" in sides["TRAIN"]
        draws.add(frozenset(sides["TRAIN"]))
        again = tmp_path / f"{seed} again"
        prepare(
            *("--action", "organize", "--source-dir", patients, "--output-dir", again),
            *("--train-images", 6, "--seed", seed),
        )
        assert digests(again) == digests(out)
    assert len(draws) > 1


def write_films(folder, stems, seed=0):
    """Write a different noisy radiograph and a mask for each stem."""
    rng = np.random.default_rng(seed)
    for stem in stems:
        write_mask(f"{folder}/IMG/{stem}.png", rng.integers(0, 255, (40, 40), dtype=np.uint8))
        write_mask(f"{folder}/MASK/{stem}.png", np.eye(40, dtype=np.uint8))


def organize(prepare, source, out, *flags):
    """{patient: the splits that it is in}, by what precedes the last underscore; what was said."""
    code, said, error = prepare(
        *("--action", "organize", "--source-dir", source, "--output-dir", out, *flags)
    )
    assert code == 0, error
    sides = {}
    for split, stems in organized(out).items():
        for stem in stems:
            sides.setdefault(stem.rpartition("_")[0], set()).add(split)
    return sides, said + error


FORMS = ["patient_{}_{}", "P{:03}-x_{}", "{:04}_{}", "kim{}_2020-01-02_{}"]


@pytest.mark.parametrize("form", FORMS)
def test_patients_in_names_stay_together(prepare, tmp_path, form):
    write_films(tmp_path / "in", [form.format(i, side) for i in range(8) for side in "ab"])
    for seed in range(3):
        sides, said = organize(prepare, tmp_path / "in", tmp_path / f"{seed}", "--seed", seed)
        assert set(map(len, sides.values())) == {1}
        assert "8 patients of 16 images" in said


def test_patients_of_dicom_files_stay_together(prepare, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        stem = f"{number % 6}x_{'lr'[number // 6]}u{number}"
        write_mask(f"{tmp_path}/in/MASK/{stem}.png", np.eye(40, dtype=np.uint8))
        (tmp_path / "in/IMG").mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (40, 40), dtype=np.uint8)
        write_dicom(tmp_path / "in/IMG", pixels, name=f"{stem}.dcm", PatientID=f"A{number % 6}")
    sides, said = organize(prepare, tmp_path / "in", tmp_path / "out")
    assert set(map(len, sides.values())) == {1}
    assert "PatientID" in said


def test_copies_stay_together(prepare, tmp_path):
    write_films(tmp_path / "in", [f"film{i}" for i in range(12)])
    for i in range(6):
        picture = read_image(str(tmp_path / f"in/IMG/film{i}.png"))
        brighter = picture // 2 + np.uint8(9)
        again = tmp_path / f"in/IMG/other{i}.png"
        write_mask(str(again), brighter)
        if not i % 3:
            shutil.copy(tmp_path / f"in/IMG/film{i}.png", again)
        shutil.copy(tmp_path / f"in/MASK/film{i}.png", tmp_path / f"in/MASK/other{i}.png")
    for seed in range(3):
        out = tmp_path / f"{seed}"
        _, said = organize(prepare, tmp_path / "in", out, "--train-split", 0.5, "--seed", seed)
        assert "2 in all: kept together" in said
        assert "4 in all: kept together" in said, said
        for stems in organized(out).values():
            assert all((f"film{i}" in stems) == (f"other{i}" in stems) for i in range(6))


def test_doubt_and_leaks_are_said(prepare, tmp_path):
    write_films(tmp_path / "in", [f"x{i}" for i in range(6)])
    _, said = organize(prepare, tmp_path / "in", tmp_path / "out")
    assert "warning: nothing tells which images are of one patient" in said
    assert "--group" in said
    for split, side in (("train", "a"), ("val", "b"), ("test", "c")):
        write_films(tmp_path / "split" / split, [f"p{i}_{side}" for i in range(4)], ord(side))
    _, said, error = prepare("--action", "validate", "--source-dir", tmp_path / "split")
    assert (said + error).count("not independent") == 3
    for flags, pairs in (((), 3), (("--train-split", 0.5), 2)):
        out = tmp_path / f"out{pairs}"
        _, said = organize(prepare, tmp_path / "split", out, *flags)
        lines = [line for line in said.splitlines() if "not independent" in line]
        assert len(lines) == pairs
        assert all("of one patient" in line for line in lines)


def test_organize_keeps_an_existing_split_by_default_and_test_always(prepare, tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for number in range(count):
            mask = np.full((4, 4), number % 2, np.uint8)
            for kind in ("images", "masks"):
                write_mask(f"{tmp_path}/in/{split}/{kind}/{split}{number}.png", mask)
    flags = ("--action", "organize", "--source-dir", tmp_path / "in", "--output-dir")
    code, out, error = prepare(*flags, tmp_path / "kept")
    assert code == 0
    assert "4 TRAIN, 2 VAL, 3 TEST" in out
    assert "warning: nothing tells which images are of one patient" in error
    assert organized(tmp_path / "kept")["VAL"] == {"val0", "val1"}
    code, out, _ = prepare(*flags, tmp_path / "new", "--train-split", 0.5)
    assert "3 TRAIN, 3 VAL, 3 TEST" in out
    stems = {p.stem for p in (tmp_path / "new/Split/TEST/IMG").iterdir()}
    assert stems == {"test0", "test1", "test2"}


def test_organize_refuses_what_it_cannot_do(prepare, patients, phantoms, tmp_path):
    flags = ("--action", "organize", "--source-dir", patients, "--output-dir", tmp_path / "out")
    for more, says in (
        (("--train-images", 24), "leave one side empty"),
        (("--train-images", 2, "--group", r"p(\d)_"), "no group has as few as 2"),
        (("--group", "patient"), "matches nothing in 24 of 24"),
        (("--group", "("), "not a regular expression"),
        (("--group", "nowhere.csv"), "nowhere.csv does not exist"),
        (("--group", "p"), "one group"),
        (("--train-split", 1.5), "above 0 and below 1"),
        (("--train-split", 0.5, "--train-images", 2), "not both"),
    ):
        code, _, error = prepare(*flags, *more)
        assert code == 2
        assert says in error
        assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    shutil.copytree(patients, broken)
    (broken / "imgs/extra.png").write_bytes(b"")
    code, _, error = prepare(*flags[:3], broken, *flags[4:])
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
    # Ten images hold class 1, ten class 2, one holds both: that one if only one may be chosen.
    classes = np.zeros((19, 3), bool)
    classes[:10, 1], classes[9:, 2] = True, True
    assert np.flatnonzero(divide(groups[:19], classes, 1, seed)).tolist() == [9]


def test_groups_of_names():
    names = ["ann_1", "ann_2", "bob/3"]
    assert read_groups(names, "") == names
    assert read_groups(names, "^[a-z]+") == ["ann", "ann", "bob"]
    assert read_groups(names, r"(\d)") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,\xe9mile\n", r"line 1 is not text in UTF-8 .* 'a,émile', .* Windows-1252"),
        (b"a," + b"x" * 200_000, "line 1 is not CSV: field larger than"),
        (b"\xff\xfea\0,\0", "has no group for 1 of 1 names"),
        (b"a,\0", "is not a text file|damaged"),
        (b"a,ann\na,bob", "lists a with the groups ann and bob"),
    ],
)
def test_a_group_file_that_is_no_csv(tmp_path, content, said):
    path = tmp_path / "patients.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"patients\.csv .*({said})"):
        read_groups(["a"], str(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_group_files_as_spreadsheets_write_them(tmp_path, encoding, separator, end):
    lines = ["name;patient", "a.png;Müller", "", '"b";"Doe, Jane"', " c.tif ;Müller"]
    text = end.join(line.replace(";", separator) for line in lines)
    (tmp_path / "p.csv").write_bytes((text + end).encode(encoding))
    found = read_groups(["a", "b", "c"], str(tmp_path / "p.csv"))
    assert found == ["Müller", "Doe, Jane", "Müller"]
