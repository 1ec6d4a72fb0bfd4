import csv
import io
import json
import os
import sys

import pytest

from guided_diffusion.runtime import text
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.log_formats import make_output_format
from guided_diffusion.runtime.storage.files import read_json, save_json, write_csv

NAME = os.fsdecode(b"r\xf6ntgen")


def test_bytes_that_are_no_utf8_are_shown():
    assert text.encode(f"{NAME} ü") == rb"r\xf6ntgen" + " ü".encode()
    assert text.visible(NAME) == r"r\xf6ntgen"
    assert text.visible("\ud800") == r"\ud800"


def test_tables_and_logs_take_any_name(tmp_path):
    write_csv(str(tmp_path / "t.csv"), ("name",), [(NAME,)])
    assert list(csv.reader((tmp_path / "t.csv").open()))[1] == [r"r\xf6ntgen"]
    for kind in ("log", "csv", "json"):
        writer = make_output_format(kind, str(tmp_path))
        writer.writekvs({"a": NAME})
        writer.close()
    assert r"r\xf6ntgen" in (tmp_path / "log.txt").read_text()
    assert r"r\xf6ntgen" in (tmp_path / "progress.csv").read_text()
    assert json.loads((tmp_path / "progress.json").read_text())["a"] == NAME


def test_json_keeps_names(tmp_path):
    save_json(str(tmp_path / "a.json"), {"name": NAME})
    assert read_json(str(tmp_path / "a.json")) == {"name": NAME}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_commands_print_any_name(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        print(NAME, "ü", "鵝")
        raise UserError(f"{NAME} is bad")

    with pytest.raises(SystemExit):
        command(main)()
    out.flush()
    assert out.buffer.getvalue().startswith(rb"r\xf6ntgen")
    assert err.buffer.getvalue() == b"error: r\\xf6ntgen is bad\n"


def test_a_library_that_takes_no_such_name_ends_in_one_line(capsys):
    def main():
        NAME.encode()

    with pytest.raises(SystemExit) as ended:
        command(main)()
    assert ended.value.code == 2
    assert "not UTF-8: rename" in capsys.readouterr().err
