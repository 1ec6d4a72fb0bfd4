"""What is written, read back by the libraries that define the formats."""

import json

import numpy as np
import pytest
from annotations_util import (
    CLASSES,
    by_pillow,
    hard_mask,
    iou,
    write_dicom_radiograph,
    write_radiographs,
)
from defusedxml import ElementTree
from PIL import Image

from guided_diffusion.segmentation.annotations.writing.config import ExportLabelsConfig
from guided_diffusion.segmentation.annotations.writing.job import export_labels
from guided_diffusion.segmentation.categories import generic_categories, to_plain

NAMES = [c.name for c in generic_categories(CLASSES)]
MASKS = {
    "a": hard_mask(),
    "sub/müller, 1": hard_mask(67, 91, 1),
    "one": np.full((1, 1), 3, np.uint8),
    "empty": np.zeros((5, 8), np.uint8),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All formats of pictures; DICOM has a module of its own."""
    place = tmp_path_factory.mktemp("export")
    write_radiographs(place, MASKS)
    (place / "c.json").write_text(json.dumps(to_plain(generic_categories(CLASSES))))
    config = ExportLabelsConfig("coco,labelme,cvat,nifti,nrrd", categories=str(place / "c.json"))
    export_labels(str(place / "MASK"), str(place / "IMG"), str(place / "OUT"), config)
    return place / "OUT"


def agree(found, mask, least=1.0):
    """Compare a region for each label with a mask."""
    assert set(found) == set(np.unique(mask).tolist()) - {0}
    for label, region in found.items():
        assert iou(region, mask == label) >= least, label


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_coco_by_pycocotools(folder):
    COCO = pytest.importorskip("pycocotools.coco").COCO

    coco = COCO(str(folder / "coco/annotations.json"))
    images = {image["file_name"]: image for image in coco.loadImgs(coco.getImgIds())}
    assert list(images) == [f"{name}.png" for name in sorted(MASKS)]
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == dict(
        enumerate(NAMES[1:], start=1)
    )
    kinds = set()
    for name, mask in MASKS.items():
        found = {}
        for one in coco.loadAnns(coco.getAnnIds(images[f"{name}.png"]["id"])):
            region = coco.annToMask(one).astype(bool)
            kinds.add(type(one["segmentation"]))
            assert one["area"] == np.count_nonzero(mask[region] == one["category_id"])
            rows, columns = np.nonzero(region)
            left, top, width, height = one["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            label = one["category_id"]
            found[label] = found.get(label, np.zeros(mask.shape, bool)) | region
        agree(found, mask, 0.99)
    assert kinds == {list, dict}  # polygons, and run lengths where there are holes


def test_labelme_files_stand_beside_their_images(folder):
    for name, mask in MASKS.items():
        plain = json.loads((folder / f"labelme/{name}.json").read_text())
        assert (plain["imageHeight"], plain["imageWidth"]) == mask.shape
        beside = (folder / f"labelme/{name}.json").parent / plain["imagePath"]
        assert np.array_equal(np.asarray(Image.open(beside)), 40 * mask)
        assert plain["imageData"] is None
        found = {}
        for shape in plain["shapes"]:
            assert shape["shape_type"] == "polygon"
            label = NAMES.index(shape["label"])
            region = by_pillow([np.array(shape["points"])], *mask.shape)
            found[label] = found.get(label, np.zeros(mask.shape, bool)) | region
        agree(found, mask)


def test_shapes_are_listed_from_the_largest_to_the_smallest(folder):
    plain = json.loads((folder / "labelme/a.json").read_text())
    mask, areas = np.zeros_like(MASKS["a"]), []
    for shape in plain["shapes"]:
        region = by_pillow([np.array(shape["points"])], *mask.shape)
        mask[region] = NAMES.index(shape["label"])
        areas.append(np.count_nonzero(region))
    assert np.array_equal(mask, MASKS["a"])
    assert areas == sorted(areas, reverse=True)


def test_cvat_images(folder):
    root = ElementTree.parse(folder / "cvat/annotations.xml").getroot()
    assert root.findtext("version") == "1.1"
    assert [label.findtext("name") for label in root.iter("label")] == NAMES[1:]
    images = {image.get("name"): image for image in root.iter("image")}
    assert list(images) == [f"{name}.png" for name in sorted(MASKS)]
    kinds = set()
    for name, mask in MASKS.items():
        image, found = images[f"{name}.png"], {}
        assert (int(image.get("height")), int(image.get("width"))) == mask.shape
        for element in image:
            kinds.add(element.tag)
            region = polygon_of(element, mask.shape)
            label = NAMES.index(element.get("label"))
            found[label] = found.get(label, np.zeros(mask.shape, bool)) | region
        agree(found, mask)
    assert kinds == {"polygon", "mask"}


def polygon_of(element, shape):
    if element.tag == "polygon":
        points = [point.split(",") for point in element.get("points").split(";")]
        return by_pillow([np.array(points, float)], *shape)
    left, top, width, height = (int(element.get(k)) for k in ("left", "top", "width", "height"))
    runs = [int(run) for run in element.get("rle").split(",")]
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    region = np.zeros(shape, bool)
    region[top : top + height, left : left + width] = values.reshape(height, width)
    return region


def test_nifti_by_nibabel(folder):
    nibabel = pytest.importorskip("nibabel")
    for name, mask in MASKS.items():
        image = nibabel.load(folder / f"nifti/{name}.nii.gz")
        assert np.array_equal(np.asarray(image.dataobj), mask.T[..., None])
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.header.get_zooms() == (1, 1, 1)
        assert image.header.get_intent()[0] == "label"


def test_nrrd_by_pynrrd(folder):
    nrrd = pytest.importorskip("nrrd")
    for name, mask in MASKS.items():
        volume, header = nrrd.read(str(folder / f"nrrd/{name}.seg.nrrd"))
        assert np.array_equal(volume, mask.T[..., None])
        assert header["space"] == "left-posterior-superior"
        assert np.array_equal(header["space directions"], np.eye(3))
        assert [header[f"Segment{i}_Name"] for i in range(CLASSES - 1)] == NAMES[1:]
        assert [header[f"Segment{i}_LabelValue"] for i in range(4)] == list("1234")


CODES = """[
  {"index": 0, "name": "none", "color": [0, 0, 0]},
  {"index": 1, "name": "lung", "color": [255, 0, 0], "dicom":
    {"category": ["123037004", "SCT", "Anatomical Structure"],
     "type": ["39607008", "SCT", "Lung"]}},
  {"index": 2, "name": "b", "color": [0, 255, 0]},
  {"index": 3, "name": "c", "color": [0, 0, 255]},
  {"index": 4, "name": "d", "color": [0, 9, 255]},
  {"index": 9, "name": "unsure", "color": [9, 9, 9], "ignore": true}]"""
PLACES = {
    "cr": {"ImagerPixelSpacing": [0.3, 0.2], "PixelSpacing": [9, 9]},
    "ct": {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "PixelSpacing": [0.3, 0.2],
        "ImagePositionPatient": [-10, 20, 5],
        "ImageOrientationPatient": [0.8, 0.6, 0, -0.6, 0.8, 0],
        "FrameOfReferenceUID": "1.2.3",
        "SliceThickness": 1,
    },
}


@pytest.fixture(scope="module")
def dicom_written(tmp_path_factory):
    place, mask = tmp_path_factory.mktemp("dicom"), hard_mask()
    mask[30:33, 60:65] = 9
    for name, elements in PLACES.items():
        write_dicom_radiograph(place / "IMG", name, np.minimum(mask, 4), **elements)
        (place / "MASK").mkdir(exist_ok=True)
        Image.fromarray(mask).save(place / f"MASK/{name}.png")
    (place / "c.json").write_text(CODES)
    config = ExportLabelsConfig("dicomseg,nifti,nrrd,labelme", categories=str(place / "c.json"))
    export_labels(str(place / "MASK"), str(place / "IMG"), str(place / "OUT"), config)
    return place, np.where(mask == 9, 255, mask)


@pytest.mark.parametrize("name", PLACES)
def test_dicom_segmentations_by_highdicom(dicom_written, name):
    highdicom, (place, mask) = pytest.importorskip("highdicom"), dicom_written
    found = highdicom.seg.segread(place / f"OUT/dicomseg/{name}.dcm")
    labels = [found.get_segment_description(i) for i in found.segment_numbers]
    assert [one.segment_label for one in labels] == ["lung", "b", "c", "d", "unsure"]
    assert labels[0].segmented_property_type.value == "39607008"
    assert labels[0].segmented_property_category.meaning == "Anatomical Structure"
    assert labels[1].segmented_property_type.meaning == "Tissue"
    assert labels[0].algorithm_type.value == "MANUAL"
    ((_, _, instance),) = found.get_source_image_uids()
    planes = found.get_pixels_by_source_instance([instance])[0]
    for plane, label in zip(np.moveaxis(planes, -1, 0), (1, 2, 3, 4, 255)):
        assert np.array_equal(plane, mask == label)


def test_label_maps_lie_on_the_radiograph(dicom_written):
    nibabel, nrrd = pytest.importorskip("nibabel"), pytest.importorskip("nrrd")
    place, mask = dicom_written
    steps = {"cr": [[0.2, 0, 0], [0, 0.3, 0]], "ct": [[0.16, 0.12, 0], [-0.18, 0.24, 0]]}
    origins = {"cr": [0, 0, 0], "ct": [-10, 20, 5]}
    for name in PLACES:
        volume, header = nrrd.read(str(place / f"OUT/nrrd/{name}.seg.nrrd"))
        assert np.array_equal(volume, mask.T[..., None])
        assert np.allclose(header["space directions"][:2], steps[name])
        assert np.allclose(header["space origin"], origins[name])
        image = nibabel.load(place / f"OUT/nifti/{name}.nii.gz")
        for affine in (image.get_sform(), image.get_qform()):
            assert np.allclose(affine[:2, :2].T * -1, np.array(steps[name])[:, :2], atol=1e-6)
            assert np.allclose(affine[:3, 3] * [-1, -1, 1], origins[name])


def test_labelme_gets_a_picture_of_dicom(dicom_written):
    place, mask = dicom_written
    plain = json.loads((place / "OUT/labelme/cr.json").read_text())
    assert plain["imagePath"] == "cr.png"
    assert Image.open(place / "OUT/labelme/cr.png").size == mask.shape[::-1]
    assert "unsure" in {shape["label"] for shape in plain["shapes"]}
