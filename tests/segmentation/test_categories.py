import contextlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import (
    BINARY,
    Category,
    ClassTable,
    categories_for,
    check_same_classes,
    from_plain,
    generic_categories,
    load_categories,
    resolve_categories,
    to_plain,
)

BITEWING = [
    ("background", (0, 0, 0)),
    ("enamel", (255, 0, 0)),
    ("bone", (0, 255, 0)),
    ("dentine", (0, 0, 255)),
    ("other", (255, 0, 254)),
    ("caries", (255, 152, 0)),
    ("pulp", (0, 255, 237)),
]


def test_default_table_is_the_seven_bitewing_classes():
    table = load_categories()
    assert [(c.name, c.color) for c in table] == BITEWING
    assert [c.index for c in table] == list(range(7))


def test_the_default_table_is_installed_with_the_package(tmp_path):
    setup = ["setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "-d", tmp_path / "lib"]
    subprocess.run([sys.executable, *setup], cwd=ROOT, check=True, capture_output=True)
    code = (
        "from guided_diffusion.segmentation import categories as c;"
        "print(c.__file__, *(one.name for one in c.categories_for(7)))"
    )
    where = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True
    )
    file, *names = ended.stdout.split()
    assert file.startswith(str(tmp_path)), ended.stderr
    assert names == [name for name, _ in BITEWING]


def test_the_table_in_flags_is_the_default_one():
    assert load_categories(str(ROOT / "flags" / "categories.json")) == load_categories()


def test_order_in_the_file_does_not_matter_and_bom_is_accepted(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(to_plain(load_categories())[::-1]), encoding="utf-8-sig")
    assert load_categories(str(path)) == load_categories()


def entry(index, name, color):
    return {"index": index, "name": name, "color": color}


A, B = entry(0, "background", [0, 0, 0]), entry(1, "lung", [255, 0, 0])


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        ({"a": 1}, "list of 2 to 255"),
        ([A], "list of 2 to 255"),
        ([A, entry(2, "lung", [9, 9, 9])], r"indices are \[0, 2\]"),
        ([A, entry(0, "lung", [9, 9, 9])], r"indices are \[0, 0\]"),
        ([A, entry(1.0, "lung", [9, 9, 9])], "index 1.0"),
        ([A, entry(True, "lung", [9, 9, 9])], "index True"),
        ([A, entry(1, "Background", [9, 9, 9])], "classes 0 and 1 share the name 'Background'"),
        ([A, entry(1, " ", [9, 9, 9])], "class 1 needs a name"),
        ([A, entry(1, "a\nb", [9, 9, 9])], "class 1 needs a name"),
        ([A, entry(1, "lung", [0, 0, 0])], r"0 and 1 share the colour \[0, 0, 0\]"),
        ([A, entry(1, "lung", [0, 0, 256])], r"class 1 \(lung\) has the colour \[0, 0, 256\]"),
        ([A, entry(1, "lung", "red")], "colour 'red'"),
        ([A, {"index": 1, "name": "lung"}], "is not a class"),
        ([A, 3], "3 is not a class"),
    ],
)
def test_faults_name_the_file_and_the_value(tmp_path, plain, says):
    path = tmp_path / "faulty.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(UserError, match=says) as error:
        load_categories(str(path))
    assert str(path) in str(error.value)


def test_broken_json_and_missing_file(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('[\n{"index": 0,,}')
    with pytest.raises(UserError, match=r"broken\.json is not valid JSON \(line 2"):
        load_categories(str(path))
    with pytest.raises(UserError, match=r"nowhere\.json"):
        load_categories(str(tmp_path / "nowhere.json"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_categories(str(path))


@given(st.integers(2, 255))
def test_generic_tables_are_valid_and_survive_plain(n):
    table = generic_categories(n)
    assert len(table) == n
    assert table[0].name == "background"
    assert table[1].name == "class 1"
    assert from_plain(json.loads(json.dumps(to_plain(table)))) == table


@pytest.mark.parametrize("n", [-1, 0, 1, 256])
def test_generic_table_size_is_checked(n):
    with pytest.raises(UserError, match=str(n)):
        generic_categories(n)


def test_table_for_a_number_of_classes(tmp_path):
    assert categories_for(7) == load_categories()
    assert categories_for(5) == generic_categories(5)
    path = tmp_path / "two.json"
    path.write_text(json.dumps([A, B]))
    assert [c.name for c in categories_for(2, str(path))] == ["background", "lung"]
    with pytest.raises(UserError, match=r"two\.json lists 2 classes but 5"):
        categories_for(5, str(path))


def never():
    raise AssertionError("the masks need not be read")


@pytest.mark.parametrize("number", [0, 2])
def test_binary_masks_have_two_classes(tmp_path, number):
    assert resolve_categories(never, number, binary=True) == BINARY
    path = tmp_path / "two.json"
    path.write_text(json.dumps([A, B]))
    table = resolve_categories(never, number, str(path), binary=True)
    assert [c.name for c in table] == ["background", "lung"]


def test_binary_masks_contradict_other_numbers(tmp_path):
    with pytest.raises(UserError, match="makes two classes, not 3"):
        resolve_categories(never, 3, binary=True)
    path = tmp_path / "three.json"
    path.write_text(json.dumps(to_plain(generic_categories(3))))
    with pytest.raises(UserError, match=r"three\.json lists 3 classes but 2"):
        resolve_categories(never, path=str(path), binary=True)


def test_a_number_or_a_table_spares_counting_the_masks(tmp_path):
    path = tmp_path / "two.json"
    path.write_text(json.dumps([A, B]))
    assert resolve_categories(never, 7) == load_categories()
    assert resolve_categories(never, 3) == generic_categories(3)
    assert resolve_categories(never, path=str(path)) == load_categories(str(path))
    assert resolve_categories(never, 2, str(path)) == load_categories(str(path))
    with pytest.raises(UserError, match=r"two\.json lists 2 classes but 3"):
        resolve_categories(never, 3, str(path))


def test_the_masks_are_counted_if_nothing_else_tells():
    assert resolve_categories(lambda: 4) == generic_categories(4)
    assert resolve_categories(lambda: 7) == load_categories()


LUNG = {
    "category": ["123037004", "SCT", "Anatomical Structure"],
    "type": ["39607008", "SCT", "Lung"],
}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("background", "Bone", "tooth"), None),
        (
            ("background", "tooth", "bone"),
            "class 1 is 'bone' in ours.json and 'tooth' in b.pth: no",
        ),
        (("background", "bone"), "ours.json has 3 classes and b.pth 2: no"),
        (("background", "bone", "tooth", "pulp"), "ours.json has 3 classes and b.pth 4: no"),
    ],
)
def test_classes_are_the_same_if_each_index_has_the_same_name(names, says):
    def table(names, ignored=()):
        return ClassTable((Category(n, name, (n, n, n)) for n, name in enumerate(names)), ignored)

    ours = table(("background", "bone", "tooth"), [Category(255, "border", (9, 9, 9))])
    refusal = pytest.raises(UserError) if says else contextlib.nullcontext()
    with refusal as raised:
        check_same_classes(ours, table(names), ("ours.json", "b.pth"), "no")
    assert says is None or str(raised.value) == says


class TestCodes:
    """What a class is in DICOM."""

    def plain(self, codes):
        return [
            {"index": 0, "name": "none", "color": [0, 0, 0]},
            {"index": 1, "name": "lung", "color": [9, 9, 9], "dicom": codes},
            {"index": 9, "name": "?", "color": [8, 8, 8], "ignore": True, "dicom": codes},
        ]

    def test_they_survive_plain(self):
        table = from_plain(self.plain(LUNG))
        assert table[0].codes is None
        assert table[1].codes.type.meaning == "Lung"
        assert table.ignored[0].codes == table[1].codes
        assert to_plain(table) == self.plain(LUNG)

    @pytest.mark.parametrize(
        "codes",
        [
            *(None, [], "Lung", {}, {"type": LUNG["type"]}, {**LUNG, "more": 1}),
            *({**LUNG, "type": t} for t in (["1", "SCT"], ["1", "SCT", 3], ["", "SCT", "x"])),
            *({**LUNG, "type": t} for t in (["1" * 17, "SCT", "x"], ["1", "S\n", "x"])),
        ],
    )
    def test_faults(self, codes):
        with pytest.raises(UserError, match=r'c.json: class 1 \(lung\): .* is no "dicom"'):
            from_plain(self.plain(codes), "c.json")
