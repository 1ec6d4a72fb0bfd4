"""Files that the tools' own libraries wrote become the masks that they hold, to the pixel."""

import base64
import io
import shutil

import numpy as np
import pytest
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
            content["categories"][1:] = [{"id": 0, "name": "teeth", "supercategory": "none"}]
            content["categories"][0]["supercategory"] = "teeth"
            write_json(tmp_path / "in" / part / "_annotations.coco.json", content)
        found = bring(tmp_path / "in", tmp_path / "out")
        assert found.images == ["train/t.jpg", "valid/v.jpg"]
        assert found.of("tooth", "train/t").any()
        assert found.names == ["background", "tooth"]
        assert "category teeth: it heads others" in found.left_out


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
