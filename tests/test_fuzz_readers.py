"""Damaged files of every kind give a result or one line; a short run of the long benchmark."""

import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz_kinds
import fuzz_readers

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.log_formats import CSVOutputFormat
from guided_diffusion.runtime.storage import files
from guided_diffusion.segmentation.visuals.render import plot_curves


@pytest.fixture(scope="module")
def kinds():
    return fuzz_kinds.make(list(fuzz_kinds.KINDS))


def test_undamaged_files_are_read(kinds, tmp_path):
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        for beside, content in (kind.beside or {}).items():
            (tmp_path / name / beside).write_bytes(content)
        for file, content in kind.files.items():
            path = tmp_path / name / file
            path.write_bytes(content)
            outcome = fuzz_readers.try_reading(kind, str(path))
            needs_more = file == "JPEGLosslessSV1.dcm"  # a decoder that is optional
            assert outcome == ("read", "") or (needs_more and outcome[0] == "refused"), file


def test_damage_is_a_function_of_seed_and_number(kinds):
    for number in range(20):
        once, again = (fuzz_readers.damaged_file(kinds, 1, number) for _ in range(2))
        assert once == again
        kind, name, content = once
        assert content != kinds[kind].files[name]


def test_findings_are_found(tmp_path):
    path = str(tmp_path / "a.png")
    for raised, outcome in (
        (None, "read"),
        (UserError(f"{path} is bad"), "refused"),
        (UserError("it is bad"), "unclean"),
        (UserError(f"{path} is\nbad"), "unclean"),
        (KeyError("x"), "unclean"),
        (ValueError("other weights"), "unclean"),
    ):

        def read(_, error=raised):
            if error:
                raise error

        assert fuzz_readers.try_reading(fuzz_kinds.Kind({}, read), path)[0] == outcome


OTHERS = [kind for kind in fuzz_kinds.KINDS if kind not in ("images", "annotations")]


@pytest.mark.parametrize("kinds", ["images", "annotations", ",".join(OTHERS)])
def test_a_few_hundred_files(kinds):
    script = str(ROOT / "benchmarks" / "fuzz_readers.py")
    command = [sys.executable, script, "--files", "300", "--seed", "11", "--kinds", kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 300" in done.stdout


def test_unknown_kinds_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fuzz_readers.py", "--kinds", "images,sounds"])
    with pytest.raises(SystemExit):
        fuzz_readers.main()
    assert "--kinds sounds: choose among images" in capsys.readouterr().err


def test_junk_reaches_every_depth():
    rng = np.random.default_rng(0)
    value = {"a": [1, {"b": 2}]}
    found = {repr(fuzz_kinds._with_junk(value, rng)) for _ in range(300)}
    assert any(text.startswith("{'a': [1, {'b': ") and text != repr(value) for text in found)
    assert repr({}) in found
    assert value == {"a": [1, {"b": 2}]}


@pytest.mark.parametrize("text", [b"\xff\xfe{", b"[" * 100_000, b"{", b"7", b'{"images": 3}'])
def test_settings_that_are_damaged(tmp_path, text):
    path = tmp_path / "settings.json"
    path.write_bytes(text)
    with pytest.raises(
        UserError, match=r"settings\.json (is not valid|is a damaged|holds no|lacks)"
    ) as caught:
        files.read_sections(str(path), "images")
    assert "codec" not in str(caught.value)


def test_a_log_that_is_damaged_is_left_as_it_is(tmp_path):
    path = tmp_path / "progress.csv"
    text = "step,loss\n1," + "2" * 200_000 + "\n"
    path.write_text(text)
    with pytest.raises(UserError, match=r"progress\.csv is damaged.*move it aside"):
        CSVOutputFormat(str(path), 5)
    assert path.read_text() == text
    with pytest.raises(UserError, match=r"progress\.csv is damaged"):
        plot_curves(str(path), str(tmp_path / "curves.png"))
