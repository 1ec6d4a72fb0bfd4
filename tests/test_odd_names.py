"""Every command on files with names as people have them."""

import csv
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_pairs
from images_util import write_dicom
from import_util import labelme, write_json
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
    names = f'"{COMMA}",{ACCENT},{UID}.dcm, {SHOWN}'
    tune = ["finetune.py", pretrained, data / "IMG", data / "MASK", "--epochs", 1]
    done(script(*tune, "--train_names", names))
    assert "4 training images" in (tmp_path / "segm_logs/log.txt").read_text()
    done(script("predict.py", "segm.pth", data / "IMG", "out", "--save_uncertainty", "True"))
    export = "--export", "coco,labelme,nifti,nrrd"
    done(script("predict.py", "segm.pth", data / "IMG", "exported", *export))
    export = ("--format", "labelme,coco,nifti,nrrd")
    done(script("export_labels.py", data / "MASK", data / "IMG", "drawn", *export))
    for folder in ("exported/EXPORT", "drawn"):
        listed = json.loads((tmp_path / folder / "coco/annotations.json").read_text())["images"]
        pictures = [*(f"{name}.png" for name in (LATIN, COMMA, ACCENT, NAMES[3])), UID]
        assert {image["file_name"] for image in listed} == set(pictures)
        for name in (LATIN, COMMA, ACCENT, NAMES[3], UID):
            plain = json.loads((tmp_path / folder / f"labelme/{name}.json").read_text())
            assert plain["imagePath"] == f"{name}.png"
            assert (tmp_path / folder / f"labelme/{name}.png").is_file()
    refused(
        script("export_labels.py", data / "MASK", data / "IMG", "xml", "--format", "cvat"),
        *(LATIN, "XML cannot hold this name"),
    )
    masks = {path.name for path in (tmp_path / "out/MASK").iterdir()}
    assert masks == {f"{name}.png" for name in (LATIN, COMMA, ACCENT, NAMES[3], UID)}
    rows = list(csv.DictReader((tmp_path / "out/areas.csv").open(encoding="utf-8")))
    assert {row["name"] for row in rows} == {SHOWN, COMMA, ACCENT, NAMES[3], UID}
    assert "xf6ntgen" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    done(script("evaluate.py", "out", data / "MASK", "--images", data / "IMG", "-o", "e1"))
    done(script("evaluate.py", data / "IMG", data / "MASK", "-m", "segm.pth", "-o", "e2"))
    for folder in ("e1", "e2"):
        assert SHOWN in (tmp_path / folder / "per_image.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("spelt", [SHOWN, "röntgen"])
def test_preparation(script, data, tmp_path, spelt):
    pair = ("--image_dir", data / "IMG", "--mask_dir", data / "MASK")
    table = f"{spelt}.png,p1\n{unicodedata.normalize('NFD', ACCENT)},p1\n"
    table += f'"{COMMA}",p2\n"x ""y"" #1%",p3\n{UID},p4\n'
    (tmp_path / "groups.csv").write_text(table, encoding="utf-8")
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


def test_annotations_of_other_tools(script, data, tmp_path):
    square = [[2, 3], [12, 3], [12, 13], [2, 13]]
    for number, path in enumerate(sorted((data / "IMG").iterdir())):
        content = labelme(("Zahn, oben", square), image=path.name, size=(16, 20))
        write_json(data / "IMG" / f"{number}.json", content)
    ended = done(script("import_labels.py", data / "IMG", "out"))
    assert "5 images with 5 annotations" in ended.out
    masks = {path.name for path in (tmp_path / "out/MASK").iterdir()}
    assert masks == {f"{name}.png" for name in (LATIN, COMMA, ACCENT, NAMES[3], UID)}
    assert (tmp_path / "out/IMG" / UID).read_bytes() == (data / "IMG" / UID).read_bytes()
    pair = ("--image_dir", "out/IMG", "--mask_dir", "out/MASK")
    categories = ("--categories", "out/categories.json")
    done(script("prepare_data.py", "--action", "validate", *pair, *categories))


def test_corrections_of_predictions(script, pretrained, data, tmp_path):
    tune = ["finetune.py", pretrained, data / "IMG", data / "MASK", "--epochs", 1]
    done(script(*tune))
    draw_pairs(tmp_path / "TRAIN", 2, seed=1)
    chosen = ("--label_next", len(NAMES) + 1, "--labelled", "TRAIN")
    done(script("predict.py", "segm.pth", data / "IMG", "out", *chosen))
    folder = tmp_path / "out/LABEL_NEXT"
    files = {f"{n}.png" for n in (LATIN, COMMA, ACCENT, NAMES[3])} | {UID}
    assert set(os.listdir(folder / "IMG")) == files
    rows = list(csv.DictReader((folder / "label_next.csv").open(encoding="utf-8")))
    assert {row["file"] for row in rows} == {f"{SHOWN}.png"} | files - {f"{LATIN}.png"}
    corrected = ("--images", folder / "IMG", "--empty", "background")
    table = ("--categories", folder / "categories.json")
    done(script("import_labels.py", folder / "labelme", *corrected, *table, "--into", "TRAIN"))
    assert set(os.listdir("TRAIN/IMG")) == files | {"r0.png", "r1.png"}
    assert Path("TRAIN/IMG", UID).read_bytes() == (data / "IMG" / UID).read_bytes()
    for name in (LATIN, COMMA, ACCENT, NAMES[3], UID):
        masks = [Image.open(Path(place, "MASK", f"{name}.png")) for place in ("TRAIN", "out")]
        assert np.array_equal(*masks)


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


def refused(ended, *parts: str) -> None:
    assert ended.code == 2, (ended.code, ended.out, ended.err)
    lines = ended.err.strip().split("\n")
    assert len(lines) == 1, ended.err
    for part in parts:
        assert part in lines[0], lines[0]


class TestPaths:
    """Paths as people type them, and folders given twice."""

    @pytest.fixture
    def model(self, pretrained, script, tmp_path):
        draw_pairs(tmp_path / "T", 2, classes=2)
        tune = ["finetune.py", pretrained, "T/IMG", "T/MASK", "--epochs", 1]
        done(script(*tune, "--weights_save", "model.pth"))
        return "model.pth"

    def test_validation_on_the_training_images_is_refused(self, script, pretrained, tmp_path):
        draw_pairs(tmp_path / "T", 2)
        shutil.copytree(tmp_path / "T", tmp_path / "V")
        for folder in ("T", "T/../T", "V"):
            argv = ["T/IMG", "T/MASK", f"{folder}/IMG", f"{folder}/MASK"]
            ended = script("finetune.py", pretrained, *argv, "--epochs", 1)
            refused(ended, "VAL holds nothing but radiographs of TRAIN", "T/IMG/r0.png")
        assert not (tmp_path / "segm_logs").exists()

    def test_prediction(self, script, model, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("FILMS", "T/IMG")
        # masks beside radiographs
        shutil.copy("T/MASK/r0.png", "T/IMG/r0_mask.png")
        assert "1 with the suffix of a mask" in done(script("predict.py", model, "T/IMG", "a")).out
        assert len(os.listdir("a/MASK")) == 2
        # variables, home, and one folder in three spellings
        twice = ["~/$FILMS", "T/IMG/", str(tmp_path / "T/../T/IMG")]
        done(script("predict.py", "-m", "$HOME/model.pth", "-i", *twice, "-o", "~/b"))
        assert len(os.listdir("b/MASK")) == 2
        # a folder with everything below it, its masks and earlier results
        done(script("predict.py", model, ".", "c"))
        done(script("predict.py", model, "**/*.png", "d"))
        assert len(list(Path("c/MASK").rglob("*.png"))) == 2
        assert len(list(Path("d/MASK").rglob("*.png"))) == 2
        # nothing but its own results, by folder, glob and file
        for source in ("a/MASK", "a/MASK/*.png", "a/MASK/r0.png"):
            refused(script("predict.py", model, source, "a"), "no radiographs in a/MASK")

    def test_results_never_replace_their_radiographs(self, script, model, tmp_path):
        before = (tmp_path / "T/IMG/r0.png").read_bytes()
        flags = ("-m", model, "-i", "T/IMG/r0.png", "T/IMG/r1.png", "-o")
        refused(script("predict.py", *flags, "x.png", "T/IMG/r0.png"), "overwrite the radiograph")
        refused(script("predict.py", *flags, "x.png", "x.png"), "overwrite the mask of")
        assert (tmp_path / "T/IMG/r0.png").read_bytes() == before

    def test_a_broken_link_is_named_or_skipped(self, script, tmp_path):
        draw_pairs(tmp_path / "T", 2)
        os.symlink("gone.png", tmp_path / "T/IMG/link.png")
        flags = "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2"
        flags += " --num_heads 1 --attention_resolutions 8 --max_steps 3 --batch_size 1"
        command = ["image_train.py", "--data_dir", "T/IMG", *flags.split(), "--sample_interval", 0]
        refused(script(*command), "T/IMG/link.png", "gone.png")
        done(script(*command, "--skip_bad_images", "True"))

    def test_truncated_files_are_found_before_work(self, script, model, tmp_path):
        content = (tmp_path / "T/IMG/r1.png").read_bytes()
        (tmp_path / "T/IMG/r1.png").write_bytes(content[: len(content) // 2])
        refused(script("predict.py", model, "T/IMG", "out"), "r1.png")
        assert not (tmp_path / "out").exists()
        ended = script("evaluate.py", "T/IMG", "T/MASK", "-m", model, "-o", "ev")
        refused(ended, "r1.png")
        flags = "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2"
        flags += " --num_heads 1 --attention_resolutions 8 --max_steps 1 --batch_size 1"
        refused(script("image_train.py", "--data_dir", "T/IMG", *flags.split()), "r1.png")
        assert not (tmp_path / "runs").exists()
