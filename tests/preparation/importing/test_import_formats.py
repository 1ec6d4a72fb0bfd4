"""Files that the tools' own libraries wrote become the masks that they hold, to the pixel."""

import base64
import io
import json
import shutil

import highdicom as hd
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from images_util import write_dicom
from import_util import (
    FILES,
    SIZE,
    SQUARE,
    TRUTH,
    bring,
    coco,
    labelme,
    refused,
    save_image,
    square,
    write_json,
)
from PIL import Image
from pycocotools import mask as coco_mask
from pydicom.sr.codedict import codes

STAR = [16.3, 1.2, 19, 9.9, 28, 10, 21, 14.5, 24.1, 22, 16, 17.2, 8, 23.3, 11, 14, 3.5, 9, 13, 9]


@pytest.mark.parametrize(
    ("source", "kind", "flags"),
    [
        ("cvat", "cvat", ()),  # datumaro
        ("cvat_masks.xml", "cvat", ()),  # datumaro and cvat-sdk
        ("coco_instances", "coco", ()),  # datumaro
        ("coco_masks", "coco", ()),
        ("labelme.json", "labelme", ()),  # labelme
        ("label_studio.json", "labelstudio", ()),  # label-studio-sdk: brush
        ("label_studio_polygons.json", "labelstudio", ()),
        ("yolo", "yolo", ("--priority", "filling")),  # label-studio-sdk
        ("Dataset001_Teeth", "nnunet", ()),  # nnunetv2
    ],
)
def test_files_of_the_tools(tmp_path, source, kind, flags):
    found = bring(FILES / source, tmp_path / "out", *flags)
    assert found.report["format"] == kind
    (image,) = found.report["images"]
    assert np.array_equal(found.truth(image["name"]), TRUTH)
    assert sorted(found.names) == ["background", "filling", "tooth"]
    assert found.report["left_out"] == []
    again = bring(FILES / source, tmp_path / "named", *flags, "--format", kind)
    assert np.array_equal(again.indices(image["name"]), found.indices(image["name"]))


@pytest.fixture
def folder(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    return tmp_path / "in"


class TestCoco:
    @pytest.mark.filterwarnings("ignore:__array__")
    def test_polygons_are_those_of_pycocotools(self, folder, tmp_path):
        parts = [STAR, [0.5, 20, 7.7, 20.2, 3, 30], [-4, -3, 5, 2, 2, 6]]
        write_json(folder / "c.json", coco((1, 1, parts)))
        runs = coco_mask.merge(coco_mask.frPyObjects(parts, *SIZE))
        assert np.array_equal(
            bring(folder, tmp_path / "out").of("tooth"), coco_mask.decode(runs).astype(bool)
        )

    @pytest.mark.parametrize("compressed", [True, False])
    def test_run_lengths(self, folder, tmp_path, compressed):
        rng = np.random.default_rng(3)
        masks = [rng.random(SIZE) < share for share in (0.4, 0.02, 1, 0.5)]
        masks[3] = np.kron(rng.random((3, 4)) < 0.5, np.ones((8, 8))) > 0
        for number, mask in enumerate(masks):
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            runs["counts"] = runs["counts"].decode()
            if not compressed:
                flat = mask.T.ravel()
                places = np.flatnonzero(np.diff(flat)) + 1
                counts = np.diff([0, *places, flat.size]).tolist()
                runs["counts"] = counts if not flat[0] else [0, *counts]
            content = coco((1, 2, runs))
            content["annotations"][0]["iscrowd"] = 1
            write_json(folder / "c.json", content)
            found = bring(folder, tmp_path / f"out{number}")
            assert np.array_equal(found.of("caries"), mask)

    def test_long_run_lengths_and_ids_with_gaps(self, tmp_path):
        """Differences of more than five bits; ids that are no indices; names like others'."""
        save_image(tmp_path / "in" / "a.png", (600, 900))
        mask = np.zeros((600, 900), bool)
        mask[40:520, 30:700] = True
        mask[100:101, 50:600] = False
        runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        runs["counts"] = runs["counts"].decode()
        content = coco((1, 1, runs), images=[("a.png", (600, 900))])
        content["categories"] = [
            {"id": 900, "name": "unused"},
            {"id": 17, "name": "tooth", "color": [1, 2, 3]},
            {"id": 3, "name": "tooth"},
        ]
        content["annotations"][0]["category_id"] = 17
        content["annotations"].append({**content["annotations"][0], "id": 2, "category_id": 3})
        content["annotations"][1]["segmentation"] = [[0, 0, 9, 0, 9, 9, 0, 9]]
        content["images"][0]["id"] = 4711
        for annotation in content["annotations"]:
            annotation["image_id"] = 4711
        write_json(tmp_path / "in" / "c.json", content)
        found = bring(tmp_path / "in", tmp_path / "out")
        mask[:9, :9] = True
        assert np.array_equal(found.of("tooth"), mask)
        assert found.names == ["background", "unused", "tooth"]
        assert found.table[2].color == (1, 2, 3)

    def test_boxes_are_no_outlines(self, folder, tmp_path):
        content = coco((1, 1, []))
        content["annotations"][0]["bbox"] = [1, 2, 3, 4]
        write_json(folder / "c.json", content)
        assert "export segmentations, not boxes" in refused(folder, tmp_path / "out")
        content["annotations"].append({**content["annotations"][0], "id": 2})
        content["annotations"][1]["segmentation"] = [STAR]
        write_json(folder / "c.json", content)
        found = bring(folder, tmp_path / "out")
        assert "annotations[0] (id 1): a box without an outline" in found.left_out

    def test_several_files(self, tmp_path):
        """As Roboflow exports them: a folder and a file for each part of the split."""
        for part in ("train", "valid"):
            save_image(tmp_path / "in" / part / f"{part[0]}.jpg")
            content = coco((1, 1, [STAR]), images=[(f"{part[0]}.jpg", SIZE)])
            write_json(tmp_path / "in" / part / "_annotations.coco.json", content)
        found = bring(tmp_path / "in", tmp_path / "out")
        assert found.images == ["train/t.jpg", "valid/v.jpg"]
        assert found.of("tooth", "train/t").any()


class TestLabelMe:
    def test_every_shape(self, folder, tmp_path):
        mask = np.zeros((4, 6), np.uint8)
        mask[1:3, 1:5] = 255
        encoded = io.BytesIO()
        Image.fromarray(mask > 0).save(encoded, "PNG")
        shapes = [
            {"label": "box", "points": [[9, 8], [2, 3]], "shape_type": "rectangle"},
            {"label": "disc", "points": [[20, 6], [20, 10]], "shape_type": "circle"},
            {"label": "root", "points": [[1.5, 22.5], [20.5, 22.5]], "shape_type": "linestrip"},
            {
                "label": "drawn",
                "points": [[24, 14], [29, 17]],
                "shape_type": "mask",
                "mask": base64.b64encode(encoded.getvalue()).decode(),
            },
            {"label": "dot", "points": [[1, 1]], "shape_type": "point"},
        ]
        write_json(folder / "a.json", labelme(*shapes))
        found = bring(folder, tmp_path / "out", "--line_width", 3)
        rows, columns = np.mgrid[:24, :32] + 0.5
        assert np.array_equal(found.of("box"), square(points=[[2, 3], [9, 8]]))
        assert np.array_equal(found.of("disc"), np.hypot(columns - 20, rows - 6) <= 4)
        assert found.of("root")[21:24, 1:21].all()
        assert found.of("root").sum() == 3 * 22  # and the round ends
        assert np.array_equal(found.of("drawn"), square(points=[[25, 15], [29, 17]]))
        assert "dot" not in found.names
        assert "shapes of the type point cover no pixels" in found.left_out

    def test_lines_can_be_left_out(self, folder, tmp_path):
        line = {"label": "root", "points": [[1, 2], [20, 20]], "shape_type": "line"}
        write_json(folder / "a.json", labelme(line, ("tooth", SQUARE)))
        assert bring(folder, tmp_path / "out").of("root").any()
        found = bring(folder, tmp_path / "without", "--line_width", 0)
        assert found.names == ["background", "tooth"]

    def test_an_embedded_image(self, tmp_path):
        content = (FILES / "a.png").read_bytes()
        text = base64.b64encode(content).decode()
        shapes = labelme(("tooth", SQUARE), image="..\\scans\\Zahn 1.jpg", imageData=text)
        write_json(tmp_path / "in" / "a.json", shapes)
        found = bring(tmp_path / "in", tmp_path / "out")
        assert found.images == ["Zahn 1.png"]
        assert (tmp_path / "out/IMG/Zahn 1.png").read_bytes() == content
        assert np.array_equal(found.of("tooth", "Zahn 1"), square())

    def test_the_separate_image_has_more_than_the_embedded_one(self, folder, tmp_path):
        Image.fromarray(np.full(SIZE, 4711, np.uint16)).save(folder / "a.png")
        text = base64.b64encode((FILES / "a.png").read_bytes()).decode()
        write_json(folder / "a.json", labelme(("tooth", SQUARE), imageData=text))
        bring(folder, tmp_path / "out")
        assert (tmp_path / "out/IMG/a.png").read_bytes() == (folder / "a.png").read_bytes()

    def test_an_embedded_file_that_is_no_image(self, tmp_path):
        for data, said in (
            ("!!", "imageData is '!!', not a file in base64"),
            (base64.b64encode(b"#!/bin/sh").decode(), "embedded image is of no format"),
            (
                base64.b64encode((FILES / "a.png").read_bytes()[:90]).decode(),
                "the image of " + str(tmp_path / "in" / "a.json cannot be read"),
            ),
        ):
            content = labelme(("tooth", SQUARE), imageData=data)
            write_json(tmp_path / "in" / "a.json", content)
            assert said in refused(tmp_path / "in", tmp_path / "out")


def cvat_xml(body, labels="<label><name>tooth</name><color>#ff7f00</color></label>"):
    return (
        "<?xml version='1.0' encoding='utf-8'?><annotations><version>1.1</version><meta><task>"
        f"<labels>{labels}</labels></task></meta><image id='0' name='a.png' width='32' height='24'>"
        f"{body}</image></annotations>"
    )


def xml_box(label, x0, y0, x1, y1, more="", inside=""):
    return f"<box label='{label}' xtl='{x0}' ytl='{y0}' xbr='{x1}' ybr='{y1}' {more}>{inside}</box>"


class TestCvat:
    def test_boxes_ellipses_lines_and_their_order(self, folder, tmp_path):
        body = xml_box("top", 2, 3, 12, 13, "z_order='2'")
        body += xml_box("tooth", 5, 3, 15, 13, "z_order='1'")
        body += "<ellipse label='disc' cx='24' cy='8' rx='5' ry='3' rotation='90'/>"
        body += "<polyline label='line' points='2.5,20.5;20.5,20.5'/>"
        body += "<points label='dot' points='1,1'/><tag label='blurred'/>"
        (folder / "annotations.xml").write_text(cvat_xml(body))
        found = bring(folder, tmp_path / "out")
        rows, columns = np.mgrid[:24, :32] + 0.5
        assert np.array_equal(found.of("top"), square())
        assert np.array_equal(found.of("tooth"), square(points=[[12, 3], [15, 13]]))
        assert np.array_equal(
            found.of("disc"), ((columns - 24) / 3) ** 2 + ((rows - 8) / 5) ** 2 <= 1
        )
        assert np.array_equal(found.of("line"), square(points=[[2, 20], [21, 21]]))
        assert found.table[1].color == (255, 127, 0)
        assert "annotations of the kind points cover no pixels" in found.left_out

    def test_an_attribute_can_be_the_class(self, folder, tmp_path):
        state = "<attribute name='state'>{}</attribute>"
        body = xml_box("tooth", 2, 3, 12, 13) + xml_box(
            "tooth", 20, 3, 25, 13, inside=state.format("Karies")
        )
        (folder / "annotations.xml").write_text(cvat_xml(body))
        found = bring(folder, tmp_path / "plain")
        assert found.names == ["background", "tooth"]
        assert "attribute state: --attribute names the one" in found.left_out
        found = bring(folder, tmp_path / "out", "--attribute", "state")
        assert np.array_equal(found.of("tooth"), square())
        assert np.array_equal(found.of("Karies"), square(points=[[20, 3], [25, 13]]))

    def test_entities_and_videos_are_refused(self, folder, tmp_path):
        bomb = "<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]>"
        path = folder / "annotations.xml"
        path.write_text(cvat_xml("").replace("<annotations>", f"{bomb}<annotations>"))
        assert "declares a document type or entities" in refused(folder, tmp_path / "out")
        path.write_text(cvat_xml("").replace("</annotations>", "<track id='0'/></annotations>"))
        assert "holds the tracks of a video" in refused(folder, tmp_path / "out")


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

    def test_which_attribute_is_the_class(self, folder, tmp_path):
        content = self.content((POLYGON, {"kind": "tooth", "sure": "yes"}))
        write_json(folder / "via.json", content)
        line = refused(folder, tmp_path / "out")
        assert "attributes kind, sure; name the one that is the class with --attribute" in line
        found = bring(folder, tmp_path / "out", "--attribute", "kind")
        assert np.array_equal(found.of("tooth"), square())


def as_volume(mask):
    """[columns x rows x 1], as ITK and its kin index."""
    return np.ascontiguousarray(mask.T[..., None])


IDENTITY = {
    "space": "left-posterior-superior",
    "space directions": np.eye(3),
    "space origin": np.zeros(3),
}


class TestVolumes:
    """Written as 3D Slicer and ITK-SNAP do, of a radiograph that states no orientation."""

    @pytest.mark.parametrize("path", sorted((FILES / "itk").iterdir()), ids=lambda path: path.name)
    def test_files_of_itk(self, folder, tmp_path, path):
        """Of a label map that was turned, the directions are what turns it back."""
        shutil.copy(path, folder)
        shutil.copy(FILES / "a.png", folder)
        found = bring(folder, tmp_path / "out", "--map", "class 1=tooth,class 2=filling")
        assert np.array_equal(found.truth(), TRUTH)

    def test_segmentations_of_slicer(self, folder, tmp_path):
        header = {
            **IDENTITY,
            "Segment0_ID": "Segment_1",
            "Segment0_Name": "tooth",
            "Segment0_LabelValue": "1",
            "Segment0_Color": "1 0.5 0",
            "Segment0_Layer": "0",
            "Segment1_Name": "filling",
            "Segment1_LabelValue": "2",
            "Segment1_Layer": "0",
        }
        nrrd.write(str(folder / "a.seg.nrrd"), as_volume(TRUTH), header)
        found = bring(folder, tmp_path / "out")
        assert np.array_equal(found.truth(), TRUTH)
        assert found.table[1].color == (255, 128, 0)

    def test_overlapping_segments_in_layers(self, folder, tmp_path):
        layers = np.stack([as_volume((TRUTH > 0).astype(np.uint8)), as_volume(TRUTH == 2)])
        header = {
            "space": "left-posterior-superior",
            "kinds": ["list", "domain", "domain", "domain"],
            "space directions": np.vstack([np.full(3, np.nan), np.eye(3)]),
            "encoding": "gzip",
        }
        for number, name in enumerate(("tooth", "filling")):
            header[f"Segment{number}_Name"] = name
            header[f"Segment{number}_LabelValue"] = "1"
            header[f"Segment{number}_Layer"] = str(number)
        nrrd.write(str(folder / "Segmentation.seg.nrrd"), layers.astype(np.uint8), header)
        assert np.array_equal(bring(folder, tmp_path / "out").truth(), TRUTH)

    @pytest.mark.parametrize("kind", ["turned", "flat", "ras", "nifti", "nifti_flipped", "plain"])
    def test_orientations(self, folder, tmp_path, kind):
        values = as_volume(TRUTH)
        path = str(folder / ("a_label.nii.gz" if kind.startswith("nifti") else "a_label.nrrd"))
        if kind == "nifti":  # its axes point right, anterior, superior
            nibabel.save(nibabel.Nifti1Image(values, np.diag([-1.0, -1, 1, 1])), path)
        elif kind == "nifti_flipped":
            nibabel.save(nibabel.Nifti1Image(values[::-1], np.diag([1.0, -1, 1, 1])), path)
        elif kind == "ras":
            ras = {**IDENTITY, "space": "right-anterior-superior"}
            nrrd.write(path, values[::-1, ::-1], ras)
        elif kind == "turned":  # first axis along the rows, second against the columns
            directions = np.array([[0, 2.0, 0], [-0.5, 0, 0], [0, 0, 1]])
            turned = values.transpose(1, 0, 2)[:, ::-1]
            nrrd.write(path, turned, {**IDENTITY, "space directions": directions})
        else:
            nrrd.write(path, values[..., 0] if kind == "flat" else values)
        found = bring(folder, tmp_path / "out", "--map", "class 1=tooth,class 2=filling")
        assert np.array_equal(found.truth(), TRUTH)

    def test_the_orientation_of_a_dicom_file(self, tmp_path):
        """A coronal radiograph: rows run down the patient."""
        (tmp_path / "in").mkdir()
        grey = (TRUTH * 100).astype(np.uint8)
        write_dicom(
            tmp_path / "in", grey, name="a.dcm", ImageOrientationPatient=[1, 0, 0, 0, 0, -1]
        )
        directions = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
        header = {**IDENTITY, "space directions": directions}
        nrrd.write(str(tmp_path / "in" / "a.seg.nrrd"), as_volume(TRUTH), header)
        found = bring(tmp_path / "in", tmp_path / "out", "--map", "class 1=tooth,class 2=filling")
        assert np.array_equal(found.truth(), TRUTH)
        nrrd.write(str(tmp_path / "in" / "a.seg.nrrd"), as_volume(TRUTH), IDENTITY)
        line = refused(tmp_path / "in", tmp_path / "again")
        assert "a.seg.nrrd does not lie in the plane of its radiograph" in line

    def test_names_by_itk_snap(self, folder, tmp_path):
        nibabel.save(nibabel.Nifti1Image(as_volume(TRUTH), np.diag([-1.0, -1, 1, 1])),
                     str(folder / "a.nii.gz"))  # fmt: skip
        (folder / "labels.txt").write_text(
            '# ITK-SnAP Label Description File\n    0     0    0    0        0  0  0    "Clear"\n'
            '    1   255  10    0        1  1  1    "tooth"\n'
            '    2     0  255    0        1  1  1    "filling"\n'
        )
        found = bring(folder, tmp_path / "out")
        assert np.array_equal(found.truth(), TRUTH)
        assert found.table[1].color == (255, 10, 0)

    def test_radiographs_that_are_volumes_too(self, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        image = np.arange(TRUTH.size, dtype=np.int16).reshape(SIZE) - 300
        for name, values in (("x.nii.gz", image), ("x_seg.nii.gz", TRUTH)):
            stored = nibabel.Nifti1Image(as_volume(values), np.diag([-1.0, -1, 1, 1]))
            nibabel.save(stored, str(folder / name))
        found = bring(folder, tmp_path / "out", "--map", "class 1=tooth,class 2=filling")
        assert np.array_equal(found.truth("x"), TRUTH)
        assert found.images == ["x.tif"]
        with Image.open(tmp_path / "out/IMG/x.tif") as written:
            assert np.array_equal(np.asarray(written), image)

    @pytest.mark.parametrize(
        ("values", "header", "said"),
        [
            (np.zeros((32, 24, 2), np.uint8), {}, "has 2 slices; radiographs have one"),
            (np.full((32, 24), 0.5, np.float32), {}, "holds fractions"),
            (np.full((32, 24), -3, np.int16), {}, "values from -3 to -3"),
            (np.ones((30, 24), np.uint8), {}, "24 x 30 pixels"),
        ],
    )
    def test_what_is_no_label_map(self, folder, tmp_path, values, header, said):
        nrrd.write(str(folder / "a.nrrd"), values, header)
        assert said in refused(folder, tmp_path / "out")

    def test_headers_that_refer_to_other_files(self, folder, tmp_path):
        header = "NRRD0004\ntype: uint8\ndimension: 2\nsizes: 32 24\nencoding: raw\n"
        (folder / "a.nrrd").write_text(f"{header}data file: ../../secret.raw\n\n")
        assert "only refers to its data" in refused(folder, tmp_path / "out")

    def test_what_unpacks_to_more_than_it_says(self, folder, tmp_path):
        nrrd.write(str(folder / "a.nrrd"), as_volume(TRUTH))
        content = (folder / "a.nrrd").read_bytes().replace(b"sizes: 32 24 1", b"sizes: 99 99 9")
        (folder / "a.nrrd").write_bytes(content)
        assert "a.nrrd is truncated: 768 of 88209 bytes" in refused(folder, tmp_path / "out")
        content = content.replace(b"sizes: 99 99 9", b"sizes: 99999 99999 9")
        (folder / "a.nrrd").write_bytes(content)
        assert "at most 100000000 pixels" in refused(folder, tmp_path / "out")


class TestNnUNet:
    def write(self, folder, labels, ending, **more):
        table = {"channel_names": {"0": "X"}, "labels": labels, "file_ending": ending, **more}
        write_json(folder / "dataset.json", table)
        (folder / "labelsTr").mkdir()
        save_image(folder / "imagesTr" / "case_1_0000.png")

    def test_pictures(self, tmp_path):
        folder = tmp_path / "Dataset001"
        self.write(folder, {"background": 0, "tooth": 1, "filling": 2, "ignore": 3}, ".png")
        values = TRUTH.copy()
        values[0] = 3
        Image.fromarray(values).save(folder / "labelsTr" / "case_1.png")
        found = bring(folder, tmp_path / "out")
        assert found.images == ["case_1.png"]
        assert (found.indices("case_1")[0] == 255).all()
        assert np.array_equal(found.indices("case_1")[1:], TRUTH[1:])
        assert found.table.ignored[0].index == 255

    def test_volumes_and_the_table_of_version_1(self, tmp_path):
        folder = tmp_path / "Task01"
        self.write(folder, {"0": "background", "1": "tooth", "2": "filling"}, ".nii.gz")
        for path, values in (("imagesTr/b_0000", TRUTH * 30), ("labelsTr/b", TRUTH)):
            stored = nibabel.Nifti1Image(as_volume(values), np.eye(4))
            nibabel.save(stored, str(folder / f"{path}.nii.gz"))
        found = bring(folder, tmp_path / "out")
        with Image.open(tmp_path / "out/IMG/b.tif") as image:
            assert np.array_equal(np.asarray(image), found.truth("b") * 30)
        assert np.array_equal(found.truth("b"), TRUTH[::-1, ::-1])  # as its own affine says

    def test_values_without_a_name(self, tmp_path):
        folder = tmp_path / "Dataset001"
        self.write(folder, {"background": 0, "tooth": 1}, ".png")
        Image.fromarray(TRUTH).save(folder / "labelsTr" / "case_1.png")
        line = refused(folder, tmp_path / "out")
        assert "case_1.png holds the value 2, which has no name among 0, 1" in line


class TestDicomSeg:
    def source(self, folder, uid="1.2.826.0.1.3680043.8.498.1", name="a.dcm"):
        folder.mkdir(exist_ok=True)
        path = write_dicom(
            folder,
            (TRUTH * 50).astype(np.uint8),
            name=name,
            SOPInstanceUID=uid,
            SOPClassUID=pydicom.uid.ComputedRadiographyImageStorage,
            StudyInstanceUID="1.2.826.0.1.3680043.8.498.2",
            SeriesInstanceUID="1.2.826.0.1.3680043.8.498.3",
            Modality="CR",
            PatientID="1",
            PatientName="A^B",
            PatientBirthDate="",
            PatientSex="",
            AccessionNumber="",
            StudyID="",
            StudyDate="",
            StudyTime="",
            ReferringPhysicianName="",
            ImagerPixelSpacing=[0.1, 0.1],
        )
        return pydicom.dcmread(path)

    def save(self, folder, source, pixels, kind, **more):
        described = [
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name,
                segmented_property_category=codes.SCT.AnatomicalStructure,
                segmented_property_type=codes.SCT.Tooth,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
                display_color=color,
            )
            for number, (name, color) in enumerate(
                (("tooth", hd.color.CIELabColor(53, 80, 67)), ("filling", None)), 1
            )
        ]
        seg = hd.seg.Segmentation(
            source_images=[source],
            pixel_array=pixels,
            segmentation_type=kind,
            segment_descriptions=described,
            series_instance_uid=hd.UID(),
            series_number=2,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="x",
            manufacturer_model_name="x",
            software_versions="1",
            device_serial_number="1",
            **more,
        )
        seg.save_as(folder / "seg.dcm")

    def test_binary_by_the_instance_that_it_refers_to(self, tmp_path):
        folder = tmp_path / "in"
        self.source(folder, "1.2.826.0.1.3680043.8.498.99", "other.dcm")
        source = self.source(folder)
        overlapping = np.stack([TRUTH > 0, TRUTH == 2], axis=-1)[None].astype(np.uint8)
        self.save(folder, source, overlapping, hd.seg.SegmentationTypeValues.BINARY)
        found = bring(folder, tmp_path / "out")
        assert found.images == ["a.dcm"]
        assert np.array_equal(found.truth(), TRUTH)
        red, green, blue = found.table[1].color
        assert red > 240
        assert max(green, blue) < 30
        assert (tmp_path / "out/IMG/a.dcm").read_bytes() == (folder / "a.dcm").read_bytes()

    def test_fractions_count_from_a_half(self, tmp_path):
        folder = tmp_path / "in"
        source = self.source(folder)
        shares = np.stack([TRUTH == 1, TRUTH == 2], axis=-1)[None] * 0.4
        shares[shares > 0] += 0.2
        shares[0, 0, 0] = 0.3
        self.save(
            folder, source, shares.astype(np.float32), hd.seg.SegmentationTypeValues.FRACTIONAL,
            fractional_type=hd.seg.SegmentationFractionalTypeValues.PROBABILITY,
            max_fractional_value=200,
        )  # fmt: skip
        assert np.array_equal(bring(folder, tmp_path / "out").truth(), TRUTH)

    def test_label_maps(self, tmp_path):
        folder = tmp_path / "in"
        source = self.source(folder)
        self.save(folder, source, TRUTH[None], hd.seg.SegmentationTypeValues.LABELMAP)
        assert np.array_equal(bring(folder, tmp_path / "out").truth(), TRUTH)

    def test_the_image_is_missing(self, tmp_path):
        folder = tmp_path / "in"
        source = self.source(folder)
        self.save(folder, source, TRUTH[None], hd.seg.SegmentationTypeValues.LABELMAP)
        (folder / "a.dcm").unlink()
        line = refused(folder, tmp_path / "out")
        assert "1 images are not in" in line
        assert source.SOPInstanceUID in line


class TestColours:
    def test_masks_in_colours(self, tmp_path):
        save_image(tmp_path / "in" / "IMG" / "a.png")
        table = [
            {"index": 0, "name": "air", "color": [0, 0, 0]},
            {"index": 1, "name": "tooth", "color": [255, 0, 0]},
            {"index": 2, "name": "filling", "color": [0, 255, 0]},
            {"index": 255, "name": "unsure", "color": [9, 9, 9], "ignore": True},
        ]
        colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [9, 9, 9]], np.uint8)
        values = TRUTH.copy()
        values[-1] = 3
        (tmp_path / "in" / "MASK").mkdir()
        Image.fromarray(colors[values]).save(tmp_path / "in" / "MASK" / "a.png")
        path = write_json(tmp_path / "table.json", table)
        found = bring(tmp_path / "in", tmp_path / "out", "--categories", path)
        assert found.report["format"] == "colours"
        expected = np.where(values == 3, 255, values)
        assert np.array_equal(found.indices(), expected)
        assert found.names == ["air", "tooth", "filling"]
        line = refused(tmp_path / "in", tmp_path / "again")
        assert "a.png holds the colour" in line
        assert "--categories" in line


def test_what_is_of_no_tool(folder, tmp_path):
    write_json(folder / "notes.json", {"x": 1})
    line = refused(folder, tmp_path / "out")
    assert "holds no annotations of COCO, LabelMe" in line
    shutil.copy(FILES / "labelme.json", folder)
    write_json(folder / "c.json", coco((1, 1, [STAR])))
    line = refused(folder, tmp_path / "out")
    assert "holds annotations of COCO" in line
    assert "choose one with --format" in line
    assert bring(folder, tmp_path / "out", "--format", "coco").names[1] == "tooth"
