"""Every command on files with names as people have them."""

import csv
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_pairs
from images_util import write_dicom
from PIL import Image

LATIN = os.fsdecode(b"r\xf6ntgen")
SHOWN = r"r\xf6ntgen"
UID = "1.2.840.9999.7.1"
COMMA = "anna, 1"
ACCENT = "müller"
NAMES = (LATIN, COMMA, unicodedata.normalize("NFD", ACCENT), 'x "y" #1%')


@pytest.fixture
def data(tmp_path) -> Path:
    """IMG and MASK with the names above and one DICOM file named by its UID."""
    draw_pairs(tmp_path / "data", len(NAMES) + 1)
    for kind in ("IMG", "MASK"):
        for number, name in enumerate(NAMES):
            path = tmp_path / "data" / kind / f"r{number}.png"
            path.rename(path.with_name(f"{name}.png"))
    path = tmp_path / "data" / "IMG" / f"r{len(NAMES)}.png"
    write_dicom(path.parent, np.asarray(Image.open(path)), name=UID)
    path.unlink()
    (tmp_path / "data/MASK" / path.name).rename(tmp_path / "data/MASK" / f"{UID}.png")
    return tmp_path / "data"


def done(ended):
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    return ended


def test_fine_tuning_prediction_and_evaluation(script, pretrained, data, tmp_path):
    names = f'"{COMMA}",{ACCENT},{UID}.dcm, {LATIN}'
    tune = ["finetune.py", pretrained, data / "IMG", data / "MASK", "--epochs", 1]
    done(script(*tune, "--train_names", names))
    assert "4 training images" in (tmp_path / "segm_logs/log.txt").read_text()
    done(script("predict.py", "segm.pth", data / "IMG", "out", "--save_uncertainty", "True"))
    masks = {path.name for path in (tmp_path / "out/MASK").iterdir()}
    assert masks == {f"{name}.png" for name in (LATIN, COMMA, ACCENT, NAMES[3], UID)}
    rows = list(csv.DictReader((tmp_path / "out/areas.csv").open(encoding="utf-8")))
    assert {row["name"] for row in rows} == {SHOWN, COMMA, ACCENT, NAMES[3], UID}
    assert "xf6ntgen" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    done(script("evaluate.py", "out", data / "MASK", "--images", data / "IMG", "-o", "e1"))
    done(script("evaluate.py", data / "IMG", data / "MASK", "-m", "segm.pth", "-o", "e2"))
    for folder in ("e1", "e2"):
        assert SHOWN in (tmp_path / folder / "per_image.csv").read_text(encoding="utf-8")


def test_preparation(script, data, tmp_path):
    pair = ("--image_dir", data / "IMG", "--mask_dir", data / "MASK")
    (tmp_path / "groups.csv").write_text(
        f"{SHOWN}.png,p1\n{unicodedata.normalize('NFD', ACCENT)},p1\n"
        f'"{COMMA}",p2\n"x ""y"" #1%",p3\n{UID},p4\n',
        encoding="utf-8",
    )
    tool = "prepare_data.py"
    done(script(tool, "--action", "organize", *pair, "--output_dir", "o", "--group", "groups.csv"))
    split = (tmp_path / "o/Split/split.csv").read_text(encoding="utf-8")
    assert all(text in split for text in (f"{SHOWN},", f"{ACCENT},", f"{UID},"))
    copied = {path.name for path in (tmp_path / "o/Split").rglob("IMG/*")}
    assert copied == {f"{n}.png" for n in (LATIN, COMMA, ACCENT, NAMES[3])} | {UID}
    done(script(tool, "--action", "analyze", "--source_dir", "o/Split", "--output_dir", "a"))
    fixing = ("--fix-issues", "True", "--output_dir", "v")
    assert script(tool, "--action", "validate", *pair, *fixing).code in (0, 1)
    shutil.copytree(tmp_path / "v/MASK", tmp_path / "colours")
    done(script("rgb2tif.py", "colours", "tifs", "--unknown", "nearest"))
    assert len(list((tmp_path / "tifs").iterdir())) == len(NAMES) + 1


def test_conflicting_groups_are_refused(script, data, tmp_path):
    (tmp_path / "g.csv").write_text(f"{ACCENT},p1\n{unicodedata.normalize('NFD', ACCENT)},p2\n")
    pair = ("--image_dir", data / "IMG", "--mask_dir", data / "MASK", "--output_dir", "o")
    ended = script("prepare_data.py", "--action", "organize", *pair, "--group", "g.csv")
    assert ended.code == 2
    assert "p1 and p2" in ended.err


def test_pretraining(script, data, tmp_path):
    (data / "IMG" / f"broken {LATIN}.png").write_text("no picture")
    words = "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2"
    words += " --num_heads 1 --attention_resolutions 8 --max_steps 6 --batch_size 1"
    words += " --save_interval 6 --sample_interval 0 --skip_bad_images True"
    done(script("image_train.py", "--data_dir", data, *words.split()))
    (run,) = (tmp_path / "runs").iterdir()
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert f"broken {SHOWN}.png cannot be read" in log
    assert "5 in folders of masks" in log
    assert "6 images in" in log
