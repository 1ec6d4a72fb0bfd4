import csv
import shutil

import numpy as np
import pytest
from conftest import digests
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.images.files import pair_files
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
            *("--train_images", 3, "--seed", seed),
        )
        sides = organized(out)
        assert len(sides["TRAIN"]) == 3
        assert len(sides["VAL"]) == 21
        assert "p5_film5" in sides["TRAIN"]
        draws.add(frozenset(sides["TRAIN"]))
        again = tmp_path / f"{seed} again"
        prepare(
            *("--action", "organize", "--source-dir", patients, "--output-dir", again),
            *("--train-images", 3, "--seed", seed),
        )
        assert digests(again) == digests(out)
    assert len(draws) > 1


def test_organize_keeps_an_existing_split_by_default_and_test_always(prepare, tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for number in range(count):
            mask = np.full((4, 4), number % 2, np.uint8)
            for kind in ("images", "masks"):
                write_mask(f"{tmp_path}/in/{split}/{kind}/{split}{number}.png", mask)
    flags = ("--action", "organize", "--source-dir", tmp_path / "in", "--output-dir")
    code, out, _ = prepare(*flags, tmp_path / "kept")
    assert code == 0
    assert "4 TRAIN, 2 VAL, 3 TEST" in out
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
        (("--train-split", 1.5), "a share between 0 and 1"),
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
