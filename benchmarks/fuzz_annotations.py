"""Files of annotation tools for fuzz_readers.py, each with an image beside it."""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile

import numpy as np
from fuzz_kinds import junk_in_json, junk_in_text
from PIL import Image

from guided_diffusion.runtime.errors import UserError

SIZE = (40, 56)
_UID = "1.2.826.0.1.3680043.8.498."
# x, y
_RING = [(4, 5), (40.5, 5), (40.5, 30.25), (20, 36), (4, 30)]
_BOX = (6, 8, 30, 28)
_YAML = b"names:\n  0: tooth\n  1: filling\n"


def images() -> dict[str, bytes]:
    """Radiographs, one for each file, as no two files may be of one image."""
    found = {f"{name.split('.')[0]}.png": _png(_grey()) for name in valid_files()}
    found.pop("seg.png")
    found["source.dcm"] = _dicom(_grey())
    return found


def valid_files() -> dict[str, bytes]:
    mask = np.zeros(SIZE, np.uint8)
    mask[5:30, 4:40], mask[10:20, 10:20] = 1, 2
    return {
        "coco.json": _json(_coco(mask)),
        "labelme.json": _json(_labelme(mask)),
        "studio.json": _json(_label_studio(mask)),
        "via.json": _json(_via()),
        "cvat.xml": _cvat(mask),
        "yolo.txt": _yolo(),
        "names.yaml": _YAML,
        "slicer.seg.nrrd": _nrrd(mask),
        "snap.nii": _nifti(mask),
        "seg.dcm": _segmentation(mask),
    }


def read(path: str) -> None:
    """Import a file; what is written must be as large as the image."""
    if path.endswith((".txt", ".yaml")):
        with tempfile.TemporaryDirectory() as folder:
            _make_yolo(path, folder)
            try:
                _import(folder)
            except UserError as error:
                message = re.sub(rf"{re.escape(folder)}/[\w./]*", path, str(error))
                raise UserError(message.replace(folder, path)) from error
    else:
        _import(path)


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Junk where a value was."""
    if content[:1] in b"[{":
        return junk_in_json(content, rng)
    return junk_in_text(content, rng)


def _import(source: str) -> None:
    from guided_diffusion.preparation.config import ImportConfig
    from guided_diffusion.preparation.importing.job import import_labels

    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "out")
        with contextlib.redirect_stdout(io.StringIO()):
            report = import_labels(source, output, ImportConfig())
        for image in report.images:
            with Image.open(os.path.join(output, "MASK", image["name"] + ".png")) as mask:
                if mask.size != SIZE[::-1]:
                    raise ValueError(f"a mask of {mask.size}")


def _make_yolo(path: str, folder: str) -> None:
    for part in ("images", "labels"):
        os.mkdir(os.path.join(folder, part))
    is_table = path.endswith(".yaml")
    places = {"data.yaml": _YAML, "labels/x.txt": _yolo(), "images/x.png": _png(_grey())}
    places.pop("data.yaml" if is_table else "labels/x.txt")
    for place, content in places.items():
        with open(os.path.join(folder, place), "wb") as file:
            file.write(content)
    shutil.copy(path, os.path.join(folder, "data.yaml" if is_table else "labels/x.txt"))


def _grey() -> np.ndarray:
    return (np.arange(SIZE[0] * SIZE[1]) % 256).astype(np.uint8).reshape(SIZE)


def _png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _runs(mask: np.ndarray) -> list[int]:
    """Run lengths of a flat mask, background first."""
    places = np.flatnonzero(np.diff(mask)) + 1
    counts = np.diff([0, *places, mask.size]).tolist()
    return [0, *counts] if mask[0] else counts


def _coco(mask: np.ndarray) -> dict:
    from pycocotools import mask as coder

    height, width = SIZE
    compressed = coder.encode(np.asfortranarray(mask == 2))
    compressed["counts"] = compressed["counts"].decode()
    shapes = (
        [[number for pair in _RING for number in pair], [1, 1, 9, 1, 9, 9.5]],
        {"size": list(SIZE), "counts": _runs((mask == 1).T.ravel())},
        compressed,
    )
    return {
        "images": [{"id": 1, "file_name": "coco.png", "height": height, "width": width}],
        "categories": [{"id": 1, "name": "tooth"}, {"id": 7, "name": "filling"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 7 if n else 1, "segmentation": shape}
            for n, shape in enumerate(shapes)
        ],
    }


def _labelme(mask: np.ndarray) -> dict:
    x0, y0, x1, y1 = _BOX
    shapes = [
        ("polygon", [list(pair) for pair in _RING], None),
        ("rectangle", [[x0, y0], [x1, y1]], None),
        ("circle", [[20, 20], [24, 20]], None),
        ("linestrip", [[1, 1], [30, 3], [50, 30]], None),
        ("mask", [[10, 10], [19, 19]], _png((mask == 2)[10:20, 10:20])),
    ]
    return {
        "version": "5.5.0",
        "imagePath": "gone.png",
        "imageData": base64.b64encode(_png(_grey())).decode(),
        "imageHeight": SIZE[0],
        "imageWidth": SIZE[1],
        "shapes": [
            {
                "label": kind,
                "points": points,
                "shape_type": kind,
                "mask": content and base64.b64encode(content).decode(),
            }
            for kind, points, content in shapes
        ],
    }


def _label_studio(mask: np.ndarray) -> list:
    size = {"original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0}
    box = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 15}
    values = {
        "polygonlabels": {"points": [[10, 10], [60, 20], [40, 80]]},
        "rectanglelabels": box,
        "ellipselabels": {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 5},
        "brushlabels": {"format": "rle", "rle": _brush(mask == 2)},
    }
    results = [
        {"id": kind, "type": kind, **size, "value": {**value, kind: [kind]}}
        for kind, value in values.items()
    ]
    annotation = {"id": 2, "completed_by": 1, "result": results, "was_cancelled": False}
    return [{"id": 1, "data": {"image": "/data/x/studio.png"}, "annotations": [annotation]}]


def _brush(mask: np.ndarray) -> list[int]:
    """Runs of one value, and at the end values one by one."""
    values = np.repeat(mask.ravel() * 255, 4)
    bits = f"{values.size:032b}" + f"{7:05b}" + f"{2:04b}{3:04b}{7:04b}{15:04b}"
    tail = 64
    for length, value in _blocks(values[:-tail]):
        bits += f"111{length - 1:016b}{value:08b}"
    bits += f"011{tail - 1:016b}" + "".join(f"{value:08b}" for value in values[-tail:])
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


def _blocks(values: np.ndarray) -> list[tuple[int, int]]:
    places = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [(b - a, int(values[a])) for a, b in itertools.pairwise(places)]


def _via() -> dict:
    x0, y0, x1, y1 = _BOX
    shapes = [
        {
            "name": "polygon",
            "all_points_x": [x for x, _ in _RING],
            "all_points_y": [y for _, y in _RING],
        },
        {"name": "rect", "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0},
        {"name": "ellipse", "cx": 20, "cy": 20, "rx": 9, "ry": 4, "theta": 0.3},
    ]
    regions = [
        {"shape_attributes": shape, "region_attributes": {"kind": shape["name"]}}
        for shape in shapes
    ]
    return {"via.png9": {"filename": "via.png", "size": 9, "regions": regions}}


def _cvat(mask: np.ndarray) -> bytes:
    x0, y0, x1, y1 = _BOX
    points = ";".join(f"{x},{y}" for x, y in _RING)
    runs = ", ".join(map(str, _runs((mask == 2)[8:22, 8:24].ravel())))
    return f"""<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels>
<label><name>tooth</name><color>#ff0000</color></label></labels></task></meta>
<image id="0" name="cvat.png" width="{SIZE[1]}" height="{SIZE[0]}">
<polygon label="tooth" points="{points}" z_order="1"><attribute name="a">b</attribute></polygon>
<box label="box" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}" rotation="20" z_order="0"/>
<mask label="mask" rle="{runs}" left="8" top="8" width="16" height="14" z_order="2"/>
</image></annotations>""".encode()


def _yolo() -> bytes:
    points = " ".join(f"{x / SIZE[1]:.6f} {y / SIZE[0]:.6f}" for x, y in _RING)
    return f"0 {points}\n1 0.1 0.1 0.3 0.1 0.3 0.4\n".encode()


def _nrrd(mask: np.ndarray) -> bytes:
    import nrrd

    header = {
        "space": "left-posterior-superior",
        "space directions": np.eye(3),
        "Segment0_Name": "tooth",
        "Segment0_LabelValue": "1",
        "Segment0_Layer": "0",
        "Segment1_Name": "filling",
        "Segment1_LabelValue": "2",
        "Segment1_Layer": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.nrrd")
        nrrd.write(path, mask.T[..., None], header)
        with open(path, "rb") as file:
            return file.read()


def _nifti(mask: np.ndarray) -> bytes:
    import nibabel

    return nibabel.Nifti1Image(mask.T[..., None], np.diag([-1.0, -1, 1, 1])).to_bytes()


def _dicom(values: np.ndarray, **elements: object) -> bytes:
    from pydicom import dcmwrite, uid
    from pydicom.dataset import Dataset, FileMetaDataset

    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = uid.SecondaryCaptureImageStorage, f"{_UID}1"
    data.Modality = "CR"
    data.Rows, data.Columns = SIZE
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = values.tobytes()
    for key, value in elements.items():
        setattr(data, key, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    stream = io.BytesIO()
    dcmwrite(stream, data, enforce_file_format=True)
    return stream.getvalue()


def _segmentation(mask: np.ndarray) -> bytes:
    """A segmentation of fractions, two frames of two segments."""
    from pydicom.dataset import Dataset

    def item(**elements: object) -> Dataset:
        data = Dataset()
        for key, value in elements.items():
            setattr(data, key, value)
        return data

    source = item(SourceImageSequence=[item(ReferencedSOPInstanceUID=f"{_UID}1")])
    frames = [
        item(
            DerivationImageSequence=[source],
            SegmentIdentificationSequence=[item(ReferencedSegmentNumber=number)],
        )
        for number in (1, 2)
    ]
    segments = [
        item(SegmentNumber=number, SegmentLabel=name)
        for number, name in ((1, "tooth"), (2, "filling"))
    ]
    values = np.stack([mask == 1, mask == 2]).astype(np.uint8) * 255
    return _dicom(
        values,
        SOPInstanceUID=f"{_UID}2",
        Modality="SEG",
        SegmentationType="FRACTIONAL",
        MaximumFractionalValue=255,
        NumberOfFrames=2,
        SegmentSequence=segments,
        PerFrameFunctionalGroupsSequence=frames,
    )
