"""3D Slicer, ITK-SNAP, nnU-Net, DICOM-SEG and colours: label maps, whichever way they lie."""

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
    TRUTH,
    bring,
    refused,
    save_image,
    write_json,
)
from PIL import Image
from pydicom.sr.codedict import codes


@pytest.fixture
def folder(tmp_path):
    save_image(tmp_path / "in" / "a.png")
    return tmp_path / "in"


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
        self.write(folder, {"0": "air", "1": "tooth", "2": "filling"}, ".nii.gz")
        for path, values in (("imagesTr/b_0000", TRUTH * 30), ("labelsTr/b", TRUTH)):
            stored = nibabel.Nifti1Image(as_volume(values), np.eye(4))
            nibabel.save(stored, str(folder / f"{path}.nii.gz"))
        found = bring(folder, tmp_path / "out")
        assert found.names == ["background", "tooth", "filling"]
        with Image.open(tmp_path / "out/IMG/b.tif") as image:
            assert np.array_equal(np.asarray(image), found.truth("b") * 30)
        assert np.array_equal(found.truth("b"), TRUTH[::-1, ::-1])  # as its own affine says

    def test_images_that_are_missing(self, tmp_path):
        folder = tmp_path / "Dataset001"
        self.write(folder, {"background": 0, "tooth": 1, "filling": 2}, ".png")
        for name in ("case_1", "case_2"):
            Image.fromarray(TRUTH).save(folder / "labelsTr" / f"{name}.png")
        line = refused(folder, tmp_path / "out")
        assert "labelsTr/case_2.png: 1 images are not in" in line
        assert "imagesTr/case_2_0000.png" in line
        save_image(folder / "imagesTr" / "case_2_0000.png")
        save_image(folder / "imagesTr" / "case_2_0001.png")
        assert "has several channels" in refused(folder, tmp_path / "out")

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
