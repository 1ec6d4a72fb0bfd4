"""Text files as people's programs write them."""

import json

import pytest

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_json, read_table, read_text

PLAIN = {"name": "Füllung", "color": [1, 2, 3]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_json_in_the_encodings_of_editors(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps(PLAIN, ensure_ascii=False).encode(encoding))
    assert read_json(str(path)) == PLAIN


def test_a_code_page_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes('{"a": 1,\n"name": "Füllung"}'.encode("cp1252"))
    said = r"x\.json line 2 is not text in UTF-8 \(byte 0xfc\); .* '\"name\": \"Füllung\""
    with pytest.raises(UserError, match=said):
        read_json(str(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", r"x is not valid JSON"),
        (b"[" * 100_000, "x is not valid JSON"),
        (b"9" * 5000, "x is not valid JSON"),
        (b"", "x is not valid JSON"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "x line 1 is not text in UTF-8"),
        (b"\xff\xfe\0", "x is a damaged text file in UTF-16: save it as UTF-8"),
        (b"abcdef\0", "x is not a text file"),
    ],
)
def test_other_content_is_one_line(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read_json(str(tmp_path / "x"))
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"cannot read the list {path}: "):
            read_text(str(path), "the list")


def test_tables(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('a;"b;c"\n;\n\n1,5;2\n')
    assert read_table(str(path)) == [["a", "b;c"], ["1,5", "2"]]
    path.write_text('a,"two\nlines"\nb,2\n')
    assert read_table(str(path)) == [["a", "two\nlines"], ["b", "2"]]
    path.write_text("only\none\n")
    assert read_table(str(path)) == [["only"], ["one"]]
    path.write_text('a,"never closed\n')
    with pytest.raises(UserError, match="line 1 is not CSV"):
        read_table(str(path))
