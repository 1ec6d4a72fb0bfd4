"""tools/export_labels.py and predict.py --export as commands."""

import json
import sys

import numpy as np
import pytest
from annotations_util import hard_mask, write_dicom_radiograph, write_radiographs
from conftest import TINY, digests
from golden_util import fill_parameters
from PIL import Image
from test_bad_inputs import refused

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.segmentation.annotations.reading.raster import Polygon
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model

TOOL = "export_labels.py"


@pytest.fixture
def data(tmp_path):
    write_radiographs(tmp_path, {"a": hard_mask(), "b": hard_mask(seed=1)})
    return tmp_path


class TestExistingMasks:
    def test_a_folder(self, script, data):
        ended = script(TOOL, "MASK", "IMG", "OUT", "--format", "labelme, COCO")
        assert (ended.code, ended.err) == (0, "")
        assert "2 masks written to OUT as labelme, coco" in ended.out
        assert sorted(path.name for path in (data / "OUT/labelme").iterdir()) == [
            *("a.json", "a.png", "b.json", "b.png")
        ]

    def test_one_file(self, script, data):
        assert script(TOOL, "MASK/a.png", "IMG/a.png", "OUT", "--format", "labelme").code == 0
        assert len(list((data / "OUT/labelme").iterdir())) == 2

    def test_results_of_predict(self, script, data):
        (data / "results").mkdir()
        (data / "MASK").rename(data / "results/MASK")
        assert script(TOOL, "results", "IMG", "OUT", "--format", "coco").code == 0

    def test_tolerance(self, script, data):
        counts = []
        for tolerance in (0, 0.5, 3):
            flags = ("--format", "labelme", "--tolerance", tolerance)
            assert script(TOOL, "MASK", "IMG", f"OUT{tolerance}", *flags).code == 0
            shapes = json.loads((data / f"OUT{tolerance}/labelme/a.json").read_text())["shapes"]
            counts.append(sum(len(shape["points"]) for shape in shapes))
        assert counts[0] > counts[1] > counts[2]

    def test_pixels_without_a_label(self, script, data):
        mask = hard_mask()
        mask[40:50, 60:70] = 255
        Image.fromarray(mask).save(data / "MASK/a.png")
        refused(script(TOOL, "MASK", "IMG", "OUT", "--format", "labelme"), "a.png", "255")
        flags = ("--format", "labelme", "--ignore_index", 255)
        assert script(TOOL, "MASK", "IMG", "OUT", *flags).code == 0
        shapes = json.loads((data / "OUT/labelme/a.json").read_text())["shapes"]
        (ignored,) = (shape for shape in shapes if shape["label"] == "ignored")
        inside = Polygon((np.array(ignored["points"]),)).draw(mask.shape)
        assert np.array_equal(inside, mask == 255)

    def test_jpeg_is_copied_as_it_is(self, script, data):
        picture = Image.open(data / "IMG/a.png")
        (data / "IMG/a.png").unlink()
        picture.save(data / "IMG/a.jpg")
        assert script(TOOL, "MASK", "IMG", "OUT", "--format", "labelme").code == 0
        copy, plain = data / "OUT/labelme/a.jpg", data / "OUT/labelme/a.json"
        assert copy.read_bytes() == (data / "IMG/a.jpg").read_bytes()
        assert json.loads(plain.read_text())["imagePath"] == "a.jpg"

    def test_16_bits_are_shown_by_a_picture_of_8(self, script, data):
        deep = hard_mask().astype(np.uint16) * 10000
        Image.fromarray(deep).save(data / "IMG/a.png")
        assert script(TOOL, "MASK", "IMG", "OUT", "--format", "labelme").code == 0
        copy = np.asarray(Image.open(data / "OUT/labelme/a.png"))
        assert copy.dtype == np.uint8
        assert np.array_equal(copy, np.rint(deep / deep.max() * 255))


class TestRefused:
    def test_a_wrong_name_of_a_format(self, script, data):
        refused(script(TOOL, "MASK", "IMG", "OUT", "--format", "coco,yolo"), "'yolo'", "labelme")
        refused(script(TOOL, "MASK", "IMG", "OUT", "--format", ","), "'' is none of coco")
        refused(script(TOOL, "MASK", "IMG", "OUT"), "--format is missing", "coco")
        assert not (data / "OUT").exists()

    @pytest.mark.parametrize("name", ["coco/annotations.json", "labelme/b.json", "labelme/a.png"])
    def test_files_that_exist(self, script, data, name):
        path = data / "OUT" / name
        path.parent.mkdir(parents=True)
        path.write_text("corrected by hand")
        before = digests(data)
        ended = script(TOOL, "MASK", "IMG", "OUT", "--format", "nifti,coco,labelme")
        refused(ended, name, "exists already and may hold corrections")
        assert digests(data) == before

    def test_a_segmentation_of_a_picture_or_of_dicom_without_identity(self, script, data):
        ended = script(TOOL, "MASK", "IMG", "OUT", "--format", "coco,dicomseg")
        refused(ended, "IMG/a.png is not DICOM", "choose another format")
        for name in "ab":
            (data / f"IMG/{name}.png").unlink()
            write_dicom_radiograph(data / "IMG", name, hard_mask(), StudyInstanceUID=None)
        ended = script(TOOL, "MASK", "IMG", "OUT", "--format", "coco,dicomseg")
        refused(ended, "IMG/a.dcm has no StudyInstanceUID")
        assert not (data / "OUT").exists()

    def test_masks_that_do_not_fit(self, script, data):
        Image.fromarray(hard_mask(30, 40)).save(data / "MASK/b.png")
        ended = script(TOOL, "MASK", "IMG", "OUT", "--format", "coco,labelme")
        refused(ended, "MASK/b.png", "30x40", "61x83")
        (data / "MASK/b.png").unlink()
        refused(script(TOOL, "MASK", "IMG", "OUT", "--format", "coco"), "b.png has no mask")
        refused(script(TOOL, "MASK", "IMG/a.png", "OUT", "--format", "coco"), "two folders")
        assert not (data / "OUT").exists()

    def test_a_class_table_with_odd_codes(self, script, data):
        (data / "c.json").write_text(
            '[{"index": 0, "name": "a", "color": [0, 0, 0]}, {"index": 1, "name": "b",'
            ' "color": [1, 1, 1], "dicom": {"type": ["1", "SCT", "Lung"]}}]'
        )
        flags = ("--format", "coco", "--categories", "c.json")
        refused(script(TOOL, "MASK", "IMG", "OUT", *flags), "class 1 (b)", '"dicom"', "39607008")

    def test_a_package_that_is_missing(self, script, data, monkeypatch):
        monkeypatch.setitem(sys.modules, "nibabel", None)
        ended = script(TOOL, "MASK", "IMG", "OUT", "--format", "nifti")
        refused(ended, "nifti needs the package nibabel", "[annotations]")


class TestPrediction:
    @pytest.fixture
    def tiny_model(self, data):
        config = SegmentationConfig(TINY, ReadingConfig(16, 1), generic_categories(3))
        weights = fill_parameters(config.build()).state_dict()
        save_model(str(data / "segm.pth"), config, weights)
        return "segm.pth"

    def test_it_writes_beside_the_other_results(self, script, data, tiny_model):
        flags = ("--export", "coco,labelme,cvat,nifti,nrrd")
        ended = script("predict.py", tiny_model, "IMG", "out", *flags)
        assert ended.code == 0, ended.err
        mask = np.asarray(Image.open(data / "out/MASK/a.png"))
        names = [c.name for c in generic_categories(3)]
        shapes = json.loads((data / "out/EXPORT/labelme/a.json").read_text())["shapes"]
        found = np.zeros_like(mask)
        for shape in shapes:
            label = names.index(shape["label"])
            found[Polygon((np.array(shape["points"]),)).draw(mask.shape)] = label
        assert shapes
        assert np.array_equal(found, mask)
        images = json.loads((data / "out/EXPORT/coco/annotations.json").read_text())["images"]
        assert [image["file_name"] for image in images] == ["a.png", "b.png"]
        # the results are no radiographs, and corrections are not overwritten
        assert "left out" in script("predict.py", tiny_model, ".", "out2").out
        assert sorted(p.name for p in (data / "out2/MASK").rglob("*.png")) == ["a.png", "b.png"]
        before = digests(data)
        ended = script("predict.py", tiny_model, "IMG", "out", *flags)
        refused(ended, "out/EXPORT/coco/annotations.json", "exists already")
        assert digests(data) == before

    def test_segmentations_say_that_a_network_drew_them(self, script, data, tiny_model):
        highdicom = pytest.importorskip("highdicom")
        write_dicom_radiograph(data / "DCM", "x", hard_mask())
        (data / "DCM/broken.dcm").write_bytes(b"no image")
        flags = ("--export", "dicomseg", "--skip_bad_images", "True")
        ended = script("predict.py", tiny_model, "DCM", "out", *flags)
        assert ended.code == 0, ended.err
        found = highdicom.seg.segread(data / "out/EXPORT/dicomseg/x.dcm")
        assert found.get_segment_description(1).algorithm_type.value == "AUTOMATIC"

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--export", "coco,cocoa"), "'cocoa' is none of coco"),
            (("--export", "coco", "--no_save", "True"), "leave out --no_save"),
            (("--export", "coco", "-o", "a.png", "b.png"), "--export needs a folder"),
            (("--export", "dicomseg"), "IMG/a.png is not DICOM"),
        ],
    )
    def test_refused(self, script, data, tiny_model, flags, said):
        refused(script("predict.py", "-m", tiny_model, "-i", "IMG", *flags), said)
        assert not (data / "results").exists()
