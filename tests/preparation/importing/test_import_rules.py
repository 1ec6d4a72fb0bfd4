"""What becomes of classes, overlaps, images and mistakes, whatever the tool."""

import errno
import json
import os
import unicodedata
import zipfile

import numpy as np
import pytest
from import_util import (
    FILES,
    SIZE,
    SQUARE,
    bring,
    coco,
    labelme,
    refused,
    save_image,
    square,
    write_json,
)
from PIL import Image

from guided_diffusion.images.image_io import read_image
from guided_diffusion.preparation.importing import job
from guided_diffusion.runtime.storage.files import save_json

INNER = [[5, 6], [9, 6], [9, 10], [5, 10]]
FLAT = [0, 0, 9, 0, 9, 9, 0, 9]


@pytest.fixture
def folder(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    return tmp_path / "in"


def draw(folder, *shapes, name="a", **more):
    return write_json(folder / f"{name}.json", labelme(*shapes, **more))


class TestOverlaps:
    SHAPES = (("tooth", SQUARE), ("caries", INNER), ("bone", [[8, 3], [30, 3], [30, 13], [8, 13]]))

    def test_the_later_one_lies_on_top(self, folder, tmp_path):
        draw(folder, *self.SHAPES)
        found = bring(folder, tmp_path / "out")
        assert found.of("bone").sum() == 22 * 10
        assert found.of("caries").sum() == 3 * 4
        assert found.of("tooth").sum() == 6 * 10 - 3 * 4

    def test_priority(self, folder, tmp_path):
        draw(folder, *self.SHAPES[::-1])
        found = bring(folder, tmp_path / "out", "--priority", "caries, tooth")
        assert np.array_equal(found.of("caries"), square(points=INNER))
        assert np.array_equal(found.of("tooth"), square() & ~square(points=INNER))
        assert found.of("bone").sum() == 18 * 10

    @pytest.mark.parametrize(
        ("priority", "said"),
        [("caries,plaque", "'plaque' is no class"), ("bone,bone", "'bone' is named twice")],
    )
    def test_unknown_priorities(self, folder, tmp_path, priority, said):
        draw(folder, *self.SHAPES)
        line = refused(folder, tmp_path / "out", "--priority", priority)
        assert said in line
        assert "classes are background, tooth, caries, bone" in line


class TestClasses:
    def test_joining_renaming_and_leaving_out(self, folder, tmp_path):
        draw(
            folder,
            ("Zahn 11", SQUARE),
            ("Zahn 12", INNER),
            ("artefact", [[20, 0], [30, 9], [20, 9]]),
        )
        flags = ("--map", "Zahn 11=tooth, Zahn 12=tooth, artefact=")
        found = bring(folder, tmp_path / "out", *flags)
        assert found.names == ["background", "tooth"]
        assert np.array_equal(found.indices() > 0, square())
        assert "1 annotations of artefact: --map leaves the class out" in found.left_out
        assert "left out: 1 x --map" in found.said

    def test_names_with_commas_and_equals_signs(self, folder, tmp_path):
        draw(folder, ("tooth, upper", SQUARE), ("a=b", INNER))
        flags = ("--map", '"tooth, upper"=upper,a=b=lower')
        assert bring(folder, tmp_path / "out", *flags).names == ["background", "upper", "lower"]

    def test_a_hole_drawn_as_background(self, folder, tmp_path):
        draw(folder, ("tooth", SQUARE), ("hole", INNER))
        found = bring(folder, tmp_path / "out", "--map", "hole=background")
        assert np.array_equal(found.of("tooth"), square() & ~square(points=INNER))
        assert found.names == ["background", "tooth"]

    def test_regions_to_ignore(self, folder, tmp_path):
        draw(
            folder,
            ("tooth", SQUARE),
            ("unsure", INNER),
            ("__ignore__", [[20, 3], [25, 13], [20, 13]]),
        )
        found = bring(folder, tmp_path / "out", "--map", "unsure=ignore")
        assert (found.indices()[square(points=INNER)] == 255).all()
        assert (found.indices() == 255).sum() > 16
        (ignored,) = found.table.ignored
        assert (ignored.index, ignored.name) == (255, "unlabelled")
        plain = json.loads((tmp_path / "out" / "categories.json").read_text())
        assert plain[-1]["ignore"] is True

    def test_what_is_not_labelled_is_background_or_ignored(self, folder, tmp_path):
        draw(folder, ("tooth", SQUARE), ("background", [[20, 3], [25, 3], [25, 13], [20, 13]]))
        assert not bring(folder, tmp_path / "b").indices()[~square()].any()
        found = bring(folder, tmp_path / "i", "--unlabelled", "ignore")
        covered = square() | square(points=[[20, 3], [25, 13]])
        assert (found.indices()[~covered] == 255).all()
        assert not found.indices()[covered & ~square()].any()

    def test_colours_differ_from_each_other_and_from_black(self, folder, tmp_path):
        content = coco((1, 1, [FLAT]), names=[f"class {n}" for n in range(1, 60)])
        for category, color in zip(content["categories"], ([0, 0, 0], [9, 9, 9], [9, 9, 9])):
            category["color"] = color
        write_json(folder / "c.json", content)
        table = bring(folder, tmp_path / "out").table
        assert table[2].color == (9, 9, 9)
        assert len({category.color for category in table}) == 60

    def test_indices_of_a_table_that_exists(self, folder, tmp_path):
        names = ("background", "bone", "Tooth", "caries")
        table = write_json(
            tmp_path / "table.json",
            [{"index": n, "name": name, "color": [n, 9, 9]} for n, name in enumerate(names)],
        )
        draw(folder, ("tooth", SQUARE), ("plaque", INNER))
        flags = ("--categories", table)
        line = refused(folder, tmp_path / "out", *flags)
        assert "table.json has no class 'plaque'; add it there, or" in line
        found = bring(folder, tmp_path / "out", *flags, "--map", "plaque=")
        assert tuple(found.names) == names
        assert np.array_equal(found.indices() == 2, square())

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--map", "tooth=x,Zahn=x"), "there is no class 'Zahn'; there are tooth, Caries"),
            (("--map", "tooth"), "--map tooth: expected NAME=CLASS, or NAME="),
            (("--map", "tooth=,Caries="), "no class is left"),
            (("--map", "tooth=caries"), "'caries' and 'Caries' differ only in capital letters"),
            (("--images", "nowhere"), "--images nowhere is not a folder"),
        ],
    )
    def test_mistakes(self, folder, tmp_path, flags, said):
        draw(folder, ("tooth", SQUARE), ("Caries", INNER))
        assert said in refused(folder, tmp_path / "out", *flags)

    def test_too_many_classes(self, folder, tmp_path):
        names = [f"n{n}" for n in range(255)]
        write_json(folder / "c.json", coco((1, 1, [FLAT]), names=names))
        assert "there are 255 classes" in refused(folder, tmp_path / "out")
        write_json(folder / "c.json", coco((1, 254, [FLAT]), names=names[:254]))
        assert bring(folder, tmp_path / "out").indices().max() == 254


class TestImages:
    def test_they_are_copied_as_they_are(self, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        Image.fromarray(np.full(SIZE, 4711, np.uint16)).save(folder / "a.tif")
        draw(folder, ("tooth", SQUARE), image="a.tif")
        bring(folder, tmp_path / "out")
        assert (tmp_path / "out/IMG/a.tif").read_bytes() == (folder / "a.tif").read_bytes()

    def test_sizes_that_differ(self, folder, tmp_path):
        draw(folder, ("tooth", SQUARE), size=(48, 64))
        line = refused(folder, tmp_path / "out")
        assert "a.json was drawn on 48 x 64 pixels (height x width)" in line
        assert "in/a.png has 24 x 32" in line

    def test_images_that_are_missing(self, folder, tmp_path):
        shapes = (("tooth", SQUARE),)
        draw(folder, *shapes)
        draw(folder, *shapes, name="b", image="scans/b.png")
        line = refused(folder, tmp_path / "out")
        assert "b.json: 1 images are not in" in line
        assert "scans/b.png; name their folder with --images, or pass --skip_missing" in line
        found = bring(folder, tmp_path / "out", "--skip_missing", "True")
        assert found.images == ["a.png"]
        assert "b.json: its image 'scans/b.png' is not in" in found.left_out
        save_image(tmp_path / "scans" / "b.png")
        save_image(tmp_path / "scans" / "a.png")
        found = bring(folder, tmp_path / "all", "--images", tmp_path / "scans")
        assert found.images == ["a.png", "b.png"]

    @pytest.mark.parametrize("name", ["../secret.png", "/{}/secret.png", "..\\secret.png"])
    def test_paths_that_leave_the_folder(self, folder, tmp_path, name):
        save_image(tmp_path / "secret.png")
        draw(folder, ("tooth", SQUARE), image=name.format(str(tmp_path).strip("/")))
        assert "secret.png; name their folder" in refused(folder, tmp_path / "out")
        save_image(folder / "deep" / "secret.png")
        assert bring(folder, tmp_path / "out").images == ["secret.png"]

    def test_exif_orientation(self, tmp_path):
        """Annotations are drawn on the image as it is shown, and so are masks."""
        folder = tmp_path / "in"
        folder.mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(32, 24)).save(
            folder / "a.png", exif=exif
        )
        draw(folder, ("tooth", SQUARE))
        found = bring(folder, tmp_path / "out")
        assert read_image(str(tmp_path / "out/IMG/a.png")).shape == SIZE
        assert np.array_equal(found.of("tooth"), square())
        draw(folder, ("tooth", SQUARE), size=(32, 24))
        line = refused(folder, tmp_path / "again")
        assert "was drawn on 32 x 24 pixels" in line
        assert "a.png has 24 x 32; is it turned by EXIF" in line

    def test_names_with_spaces_and_accents(self, tmp_path):
        folder = tmp_path / "in"
        stored, named = (
            unicodedata.normalize(form, "Zähne, 1. Aufnahme") for form in ("NFD", "NFC")
        )
        save_image(folder / "é" / f"{stored}.png")
        draw(folder, ("Füllung", SQUARE), image=f"é/{named}.png")
        found = bring(folder, tmp_path / "out")
        assert found.names[1] == "Füllung"
        assert found.report["images"][0]["name"] == named
        assert np.array_equal(found.of("Füllung", named), square())

    def test_the_same_image_twice(self, folder, tmp_path):
        draw(folder, ("tooth", SQUARE))
        draw(folder, ("tooth", INNER), name="b")
        line = refused(folder, tmp_path / "out")
        assert "a.png is annotated twice" in line
        assert "in/a.json and " in line
        assert "in/b.json; remove one of them" in line
        write_json(
            folder / "c.json", coco((1, 1, [FLAT]), (2, 1, [FLAT]), images=[("a.png", SIZE)] * 2)
        )
        line = refused(folder / "c.json", tmp_path / "out")
        assert "images[0] ('a.png') and" in line

    def test_one_name_for_two_images(self, folder, tmp_path):
        save_image(folder / "a.bmp")
        draw(folder, ("tooth", SQUARE))
        draw(folder, ("tooth", SQUARE), name="b", image="a.bmp")
        line = refused(folder, tmp_path / "out")
        assert "a.bmp" in line
        assert "would both be a; rename one of them" in line

    def test_a_name_that_several_images_have(self, tmp_path):
        for part in ("x", "y"):
            save_image(tmp_path / "in" / "images" / part / "a.png")
        draw(tmp_path / "in" / "drawn", ("tooth", SQUARE), image="a.png")
        line = refused(tmp_path / "in", tmp_path / "out")
        assert "its image 'a.png' could be" in line
        draw(tmp_path / "in" / "drawn", ("tooth", SQUARE), image="elsewhere/y/a.png")
        assert bring(tmp_path / "in", tmp_path / "out").images == ["a.png"]
        copied = (tmp_path / "out/IMG/a.png").read_bytes()
        assert copied == (tmp_path / "in/images/y/a.png").read_bytes()

    def test_images_without_annotations(self, folder, tmp_path):
        save_image(folder / "b.png")
        write_json(
            folder / "c.json", coco((1, 1, [FLAT]), images=[("a.png", SIZE), ("b.png", SIZE)])
        )
        found = bring(folder, tmp_path / "out")
        assert found.images == ["a.png"]
        assert "('b.png'): without annotations" in found.left_out
        found = bring(folder, tmp_path / "all", "--empty", "background")
        assert found.images == ["a.png", "b.png"]
        assert not found.indices("b").any()

    def test_damaged_images(self, folder, tmp_path):
        content = (folder / "a.png").read_bytes()
        (folder / "a.png").write_bytes(content[:200])
        draw(folder, ("tooth", SQUARE))
        assert "in/a.png cannot be read" in refused(folder, tmp_path / "out")


class TestRegions:
    def test_what_lies_outside_of_the_image(self, folder, tmp_path):
        outside = [[100, 100], [120, 100], [120, 120]]
        beyond = [[-5, -5], [4, -5], [4, 6], [-5, 6]]
        draw(folder, ("tooth", beyond), ("tooth", outside))
        found = bring(folder, tmp_path / "out")
        assert np.array_equal(found.of("tooth"), square(points=beyond))
        assert "shapes[1] (tooth): it covers the centre of no pixel" in found.left_out

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"points": [[1, 2], [3, "x"], [4, 5]]}, "a.json shapes[0].points[1][1] is 'x', not a"),
            ({"points": [[1, 2], [3], [4, 5]]}, "a.json shapes[0].points[1] is a list of 1, not a"),
            ({"points": [[1, 2], [3, 1e30], [4, 5]]}, "a.json shapes[0].points[1][1] is 1e+30"),
            ({"points": [[1, 2], [3, float("nan")], [4, 5]]}, "points[1][1] is nan, not a number"),
            ({"points": [[1, 2], [3, 10**400], [4, 5]]}, "points[1][1] is 1000000"),
            ({"label": ""}, "a.json shapes[0].label is '', not a text on one line"),
            ({"label": "a\nb"}, r"a.json shapes[0].label is 'a\nb', not a text on one line"),
            ({"shape_type": "circle"}, "a.json shapes[0] (tooth): a circle has 2 points, not 4"),
            ({"points": None}, "a.json shapes[0] lacks 'points'; export it again"),
        ],
    )
    def test_mistakes_name_file_and_annotation(self, folder, tmp_path, change, said):
        shape = {"label": "tooth", "points": SQUARE, "shape_type": "polygon", **change}
        draw(folder, shape)
        assert said in refused(folder, tmp_path / "out")


class TestOutput:
    def test_nothing_is_overwritten(self, folder, tmp_path):
        draw(folder, ("tooth", SQUARE))
        bring(folder, tmp_path / "out")
        before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
        (tmp_path / "other").mkdir()
        assert bring(folder, tmp_path / "other").images == ["a.png"]
        for source, output, said in (
            (folder, "out", "OUTPUT out is not empty"),
            (folder, "in/new", "OUTPUT in/new lies in"),
            ("nowhere", "new", "nowhere does not exist"),
        ):
            os.chdir(tmp_path)
            ended = refused_any(source, output)
            assert said in ended
        assert {p: p.read_bytes() for p in before} == before

    @pytest.mark.parametrize("exists", [True, False])
    def test_what_cannot_be_written_whole_is_not_written(
        self, folder, tmp_path, monkeypatch, exists
    ):
        draw(folder, ("tooth", SQUARE))
        replace, done = os.replace, []

        def fill(source, target):
            done.append(target)
            if len(done) > 2:
                raise OSError(errno.ENOSPC, "")
            replace(source, target)

        if exists:
            (tmp_path / "out").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fill)
            assert "no space left" in refused_any(folder, tmp_path / "out")
        assert len(done) == 3
        assert list(tmp_path.glob("out*")) == [tmp_path / "out"] * exists
        assert not list(tmp_path.glob("out/*"))
        assert bring(folder, tmp_path / "out").images == ["a.png"]

    def test_the_report(self, folder, tmp_path):
        draw(folder, ("tooth", SQUARE), ("caries", INNER))
        found = bring(folder, tmp_path / "out")
        (image,) = found.report["images"]
        assert image["pixels"] == {"background": 768 - 100, "tooth": 84, "caries": 16}
        assert image["annotations"] == 2
        assert image["image"] == str(folder / "a.png")
        assert "1 images with 2 annotations (labelme) written to" in found.said
        assert "1 tooth: in 1 images" in found.said


def refused_any(source, output):
    from conftest import run_script

    ended = run_script("import_labels.py", source, output)
    assert ended.code == 2
    return ended.err


def test_files_that_are_no_json(folder, tmp_path):
    (folder / "a.json").write_text("{")
    assert "a.json is not valid JSON" in refused(folder, tmp_path / "out")
    (folder / "a.json").write_bytes(b"\xff\xfe\x00")
    assert "a.json" in refused(folder, tmp_path / "out")
    path = folder / "a.xml"
    (folder / "a.json").unlink()
    path.write_text("<annotations><image>")
    assert "a.xml is not valid XML" in refused(folder, tmp_path / "out")


def test_archives_are_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("a.json", "{}")
    line = refused(tmp_path / "export.zip", tmp_path / "out")
    assert "export.zip is an archive; unpack it, and name the folder" in line


def test_one_of_many_files_is_damaged_or_of_something_else(folder, tmp_path):
    draw(folder, ("tooth", SQUARE))
    (folder / "b.json").write_text("{")
    for flags in ((), ("--format", "labelme")):
        assert "b.json is not valid JSON" in refused(folder, tmp_path / "out", *flags)
    (folder / "b.json").write_text("{}")
    found = bring(folder, tmp_path / "out")
    assert "b.json: no annotations of LabelMe" in found.left_out


def test_a_format_that_the_files_are_not_of(folder, tmp_path):
    line = refused(FILES / "labelme.json", tmp_path / "out", "--format", "coco")
    assert "labelme.json lacks 'images'; export it again" in line
    line = refused(folder, tmp_path / "out", "--format", "cvat")
    assert "holds no annotations of CVAT for images 1.1, files that end in .xml" in line
    line = refused(folder, tmp_path / "out", "--format", "nnunet")
    assert "lacks dataset.json" in line

    @pytest.mark.parametrize("other", [False, True])
    def test_what_a_killed_import_left_does_not_count(self, folder, tmp_path, monkeypatch, other):
        draw(folder, ("tooth", SQUARE))
        out = tmp_path / "out"
        save_image(out / ".partial/IMG/b.png")
        if other:
            save_image(out / "c.png")
            assert "out is not empty" in refused_any(folder, out)
            return
        meanwhile = []

        def look(path, value):
            meanwhile.append(os.listdir(out))
            save_json(path, value)

        monkeypatch.setattr(job, "save_json", look)
        found = bring(folder, out)
        assert meanwhile == [[".partial"]] * 2
        assert found.of("tooth").sum() == 100
        assert sorted(os.listdir(out)) == ["IMG", "MASK", "categories.json", "import.json"]
        assert os.listdir(out / "IMG") == ["a.png"]
