"""Label Studio, VIA and YOLO: what their files hold becomes a mask, to the pixel."""

import base64
import io
import json

import numpy as np
import pytest
from import_util import (
    FILES,
    SIZE,
    SQUARE,
    TRUTH,
    bring,
    refused,
    save_image,
    square,
    write_json,
)
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    return tmp_path / "in"


def task(*annotations, image="a.png"):
    return {"id": 3, "data": {"image": image}, "annotations": list(annotations)}


def by(person, *results, **more):
    return {"id": 9, "completed_by": person, "result": list(results), **more}


def result(label, kind="polygon", size=SIZE, **value):
    if kind == "polygon":
        value = {"points": [[x * 100 / size[1], y * 100 / size[0]] for x, y in value["points"]]}
    return {
        "id": "x",
        "type": f"{kind}labels",
        "original_width": size[1],
        "original_height": size[0],
        "value": {**value, f"{kind}labels": [label]},
    }


class TestLabelStudio:
    def test_images_elsewhere(self, folder, tmp_path):
        path = write_json(tmp_path / "e.json", [task(by(1, result("tooth", points=SQUARE)))])
        found = bring(path, tmp_path / "out", "--images", folder)
        assert np.array_equal(found.of("tooth"), square())

    @pytest.mark.parametrize(
        "address",
        [
            "/data/upload/1/0a1b2c3d-Z%C3%A4hne%201.png",
            "/data/local-files/?d=scans%2FZ%C3%A4hne%201.png",
            "s3://bucket/scans/Zähne 1.png",
            "https://example.org/x/Z%C3%A4hne%201.png?token=1",
        ],
    )
    def test_images_by_their_addresses(self, tmp_path, address):
        save_image(tmp_path / "in" / "scans" / "Zähne 1.png")
        tasks = [task(by(1, result("tooth", points=SQUARE)), image=address)]
        write_json(tmp_path / "in" / "export.json", tasks)
        found = bring(tmp_path / "in", tmp_path / "out")
        assert np.array_equal(found.of("tooth", "Zähne 1"), square())

    def test_rectangles_turn_about_their_corner(self, folder, tmp_path):
        box = {"x": 50, "y": 25, "width": 25, "height": 25}  # 16, 6, 8 x 6 pixels
        write_json(
            folder / "e.json",
            [
                task(
                    by(
                        1,
                        result("tooth", "rectangle", **box),
                        result("other", "rectangle", **box, rotation=90),
                        result("disc", "ellipse", x=12.5, y=50, radiusX=6.25, radiusY=25),
                    )
                )
            ],
        )
        found = bring(folder, tmp_path / "out")
        rows, columns = np.mgrid[:24, :32] + 0.5
        assert np.array_equal(found.of("tooth"), square(points=[[16, 6], [24, 12]]))
        assert np.array_equal(found.of("other"), square(points=[[10, 6], [16, 14]]))
        assert np.array_equal(
            found.of("disc"), ((columns - 4) / 2) ** 2 + ((rows - 12) / 6) ** 2 <= 1
        )

    def test_several_annotators(self, folder, tmp_path):
        boxes = {"ann": [[2, 3], [12, 13]], "bob": [[4, 3], [14, 13]], "eva": [[8, 3], [18, 13]]}
        corners = {name: [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
                   for name, ((x0, y0), (x1, y1)) in boxes.items()}  # fmt: skip
        people = [
            by({"email": name, "id": n}, result("tooth", points=points))
            for n, (name, points) in enumerate(corners.items())
        ]
        skipped = by({"email": "joe"}, was_cancelled=True)
        write_json(folder / "e.json", [task(*people, skipped)])
        line = refused(folder, tmp_path / "out")
        assert "a.png is annotated by ann" in line
        assert "and by bob" in line
        assert "--annotator: a name, first or vote" in line
        for name in ("bob", "eva"):
            found = bring(folder, tmp_path / name, "--annotator", name)
            assert np.array_equal(found.of("tooth"), square(points=boxes[name]))
            assert "skipped by its annotator" in found.left_out
        found = bring(folder, tmp_path / "first", "--annotator", "first")
        assert np.array_equal(found.of("tooth"), square(points=boxes["ann"]))
        found = bring(folder, tmp_path / "vote", "--annotator", "vote")
        assert np.array_equal(found.of("tooth"), square(points=[[4, 3], [14, 13]]))
        assert "no annotated image" in refused(folder, tmp_path / "none", "--annotator", "zoe")

    def test_a_vote_without_a_majority_has_no_label(self, folder, tmp_path):
        people = [by(n, result(name, points=SQUARE)) for n, name in enumerate(("tooth", "caries"))]
        write_json(folder / "e.json", [task(*people)])
        flags = ("--annotator", "vote", "--unlabelled", "ignore")
        assert (bring(folder, tmp_path / "out", *flags).indices() == 255).all()
        assert not bring(folder, tmp_path / "plain", *flags[:2]).indices().any()

    def test_an_image_turned_in_the_tool(self, folder, tmp_path):
        turned = {**result("tooth", points=SQUARE), "image_rotation": 90}
        write_json(folder / "e.json", [task(by(1, turned))])
        line = refused(folder, tmp_path / "out")
        assert "result[0].image_rotation is 90, not 0; turn the image file itself" in line

    def test_labels_apart_from_their_regions_and_bitmasks(self, folder, tmp_path):
        plain = result("x", points=SQUARE)
        plain = {**plain, "type": "polygon", "value": {"points": plain["value"]["points"]}}
        label = {"id": "x", "type": "labels", "value": {"labels": ["tooth"]}}
        encoded = io.BytesIO()
        Image.fromarray((TRUTH == 2).astype(np.uint8) * 255).save(encoded, "PNG")
        url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
        bits = {**result("filling", "bitmask", imageDataURL=url), "id": "y"}
        write_json(folder / "e.json", [task(by(1, plain, label, bits))])
        found = bring(folder, tmp_path / "out")
        assert np.array_equal(found.of("filling"), TRUTH == 2)
        assert np.array_equal(found.of("tooth"), square() & (TRUTH != 2))

    def test_other_exports_are_named(self, folder, tmp_path):
        write_json(folder / "e.json", [{"image": "a.png", "label": []}])
        line = refused(folder / "e.json", tmp_path / "out", "--format", "labelstudio")
        assert "export as JSON, not as JSON-MIN" in line

    def test_damaged_brush_strokes(self, folder, tmp_path):
        content = json.loads((FILES / "label_studio.json").read_text())
        rle = content[0]["annotations"][0]["result"][0]["value"]
        for damaged in (rle["rle"][:40], [], [255] * 60):
            rle["rle"] = damaged
            write_json(folder / "e.json", content)
            line = refused(folder, tmp_path / "out")
            assert "e.json[0].annotations[0].result[0].value.rle is" in line


class TestYolo:
    def write(self, folder, line, yaml="names: [tooth, caries]\n"):
        save_image(folder / "train" / "images" / "x.png")
        (folder / "train" / "labels").mkdir(exist_ok=True)
        (folder / "train" / "labels" / "x.txt").write_text(line)
        (folder / "data.yaml").write_text(yaml)

    def test_as_roboflow_exports(self, tmp_path):
        points = [(x / 32, y / 24) for x, y in SQUARE]
        line = "1 " + " ".join(f"{v:.17g}" for pair in points for v in pair)
        self.write(tmp_path / "in", f"{line}\n0 0.5 0.5 0.1 0.1\n")
        save_image(tmp_path / "in" / "train" / "images" / "unlabelled.png")
        found = bring(tmp_path / "in", tmp_path / "out")
        assert np.array_equal(found.of("caries", "x"), square())
        assert found.names == ["background", "tooth", "caries"]
        assert "x.txt line 2: a box without an outline" in found.left_out
        self.write(tmp_path / "in", line, "names:\n  0: tooth\n  1: Käries\n")
        assert np.array_equal(bring(tmp_path / "in", tmp_path / "b").of("Käries", "x"), square())

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("2 0 0 1 0 1 1", "x.txt line 1: class '2' is not among the 2 of data.yaml"),
            ("0 0 0 1 0 1", "x.txt line 1: expected a class and at least 3 points"),
            ("0 0 0 1 0 1 x", "x.txt line 1: expected a class and at least 3 points"),
            ("0 0.5 0.5 0.1 0.1", "its 1 annotations are boxes"),
        ],
    )
    def test_wrong_lines(self, tmp_path, line, said):
        self.write(tmp_path / "in", line)
        assert said in refused(tmp_path / "in", tmp_path / "out")


POLYGON = {
    "name": "polygon",
    "all_points_x": [x for x, _ in SQUARE],
    "all_points_y": [y for _, y in SQUARE],
}


class TestVia:
    def content(self, *regions, name="a.png"):
        listed = [
            {"shape_attributes": shape, "region_attributes": attributes}
            for shape, attributes in regions
        ]
        return {f"{name}123": {"filename": name, "size": 123, "regions": listed}}

    @pytest.mark.parametrize("project", [True, False])
    def test_regions(self, folder, tmp_path, project):
        rectangle = {"name": "rect", "x": 20, "y": 3, "width": 5, "height": 10}
        content = self.content(
            (POLYGON, {"kind": "tooth"}),
            (rectangle, {"kind": {"filling": True, "gap": False}}),
            ({"name": "circle", "cx": 16, "cy": 18, "r": 4}, {"kind": "disc"}),
            ({"name": "point", "cx": 1, "cy": 1}, {"kind": "dot"}),
            (rectangle, {"kind": ""}),
        )
        if project:
            content = {"_via_settings": {}, "_via_img_metadata": content, "_via_attributes": {}}
        write_json(folder / "via.json", content)
        found = bring(folder, tmp_path / "out")
        assert found.report["format"] == "via"
        assert np.array_equal(found.of("tooth"), square())
        assert np.array_equal(found.of("filling"), square(points=[[20, 3], [25, 13]]))
        assert found.of("disc")[18, 16]
        assert "its attribute kind is empty" in found.left_out

    def test_images_elsewhere(self, folder, tmp_path):
        path = write_json(tmp_path / "via.json", self.content((POLYGON, {"kind": "tooth"})))
        found = bring(path, tmp_path / "out", "--images", folder)
        assert np.array_equal(found.of("tooth"), square())

    def test_nothing_was_drawn(self, folder, tmp_path):
        write_json(folder / "via.json", self.content())
        assert "holds no annotated image" in refused(folder, tmp_path / "out")

    def test_which_attribute_is_the_class(self, folder, tmp_path):
        content = self.content((POLYGON, {"kind": "tooth", "sure": "yes"}))
        write_json(folder / "via.json", content)
        line = refused(folder, tmp_path / "out")
        assert "attributes kind, sure; name the one that is the class with --attribute" in line
        found = bring(folder, tmp_path / "out", "--attribute", "kind")
        assert np.array_equal(found.of("tooth"), square())
