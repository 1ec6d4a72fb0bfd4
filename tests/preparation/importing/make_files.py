"""Write the files in `files/` with the libraries of the annotation tools themselves.

    python -m venv tools
    tools/bin/pip install labelme datumaro label-studio-sdk cvat-sdk SimpleITK
    tools/bin/pip install --no-deps nnunetv2 batchgenerators
    tools/bin/python tests/preparation/importing/make_files.py

These need other versions of numpy than the package, so that the files are kept, not the libraries.
Polygons have corners on the grid between pixels: what they cover is plain.
"""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cvat_sdk.masks
import numpy as np
import SimpleITK as sitk
from datumaro.components.annotation import AnnotationType, LabelCategories, Mask, Polygon
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image as DatumImage
from label_studio_sdk.converter import Converter, brush
from labelme._label_file import LabelFile
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from PIL import Image

FILES = Path(__file__).with_name("files")
HEIGHT, WIDTH = 24, 32
NAMES = ("tooth", "filling")
# x, y; the second lies on the first
CORNERS = {
    "tooth": [(4, 3), (20, 3), (20, 13), (12, 13), (12, 20), (4, 20)],
    "filling": [(6, 5), (10, 5), (10, 9), (6, 9)],
}


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:13, 4:20] = 1
    mask[13:20, 4:12] = 1
    mask[5:9, 6:10] = 2
    return mask


def picture() -> Image.Image:
    return Image.fromarray((truth() * 60 + 40).astype(np.uint8))


def with_datumaro() -> None:
    """CVAT's XML and COCO."""
    categories = {AnnotationType.label: LabelCategories.from_iterable(NAMES)}
    polygons = [
        Polygon([float(v) for pair in CORNERS[name] for v in pair], label=label, z_order=label)
        for label, name in enumerate(NAMES)
    ]
    grey = np.repeat(np.asarray(picture())[..., None], 3, axis=2)
    for kind, annotations in (
        ("cvat", polygons),
        ("coco_instances", polygons),
        ("coco_masks", [Mask(truth() == 1, label=0), Mask(truth() == 2, label=1)]),
    ):
        media = DatumImage.from_numpy(grey)
        item = DatasetItem(id="a", subset="train", media=media, annotations=annotations)
        data = Dataset.from_iterable([item], categories=categories)
        folder = FILES / kind
        shutil.rmtree(folder, ignore_errors=True)
        format_of = {"coco_masks": "coco_instances"}.get(kind, kind)
        data.export(str(folder), format_of, save_media=True, image_ext=".png")


def with_cvat() -> None:
    """A mask in CVAT's run lengths, in the XML that datumaro writes around it."""
    (path,) = (FILES / "cvat").glob("*.xml")
    tree = ElementTree.parse(path)
    image = tree.getroot().find("image")
    for element in list(image):
        image.remove(element)
    for number, name in enumerate(NAMES, 1):
        *runs, left, top, right, bottom = cvat_sdk.masks.encode_mask(truth() == number)
        ElementTree.SubElement(
            image,
            "mask",
            label=name,
            source="manual",
            occluded="0",
            rle=", ".join(map(str, runs)),
            left=str(left),
            top=str(top),
            width=str(right - left + 1),
            height=str(bottom - top + 1),
            z_order="0",
        )
    tree.write(FILES / "cvat_masks.xml", encoding="utf-8", xml_declaration=True)


def with_labelme() -> None:
    image = FILES / "a.png"
    picture().save(image)
    shapes = [
        {
            "label": name,
            "points": [list(map(float, pair)) for pair in CORNERS[name]],
            "group_id": None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for name in NAMES
    ]
    LabelFile().save(
        filename=str(FILES / "labelme.json"),
        shapes=shapes,
        image_path="a.png",
        image_data=LabelFile.load_image_file(str(image)),
        image_height=HEIGHT,
        image_width=WIDTH,
    )


def with_label_studio() -> None:
    results = []
    for number, name in enumerate(NAMES, 1):
        path = FILES / f"{name}.png"
        Image.fromarray(((truth() == number) * 255).astype(np.uint8)).save(path)
        annotation = brush.image2annotation(str(path), name, "tag", "image")
        results += annotation["result"]
        path.unlink()
    (FILES / "label_studio.json").write_text(json.dumps([task_of(results)]))


def task_of(results: list[dict]) -> dict:
    return {
        "id": 1,
        "data": {"image": "/data/upload/1/0a1b2c3d-a.png"},
        "annotations": [{"id": 7, "completed_by": 1, "result": results, "was_cancelled": False}],
    }


def with_label_studio_converter() -> None:
    """YOLO's polygons."""
    results = [
        {
            "id": name,
            "type": "polygonlabels",
            "from_name": "tag",
            "to_name": "image",
            "original_width": WIDTH,
            "original_height": HEIGHT,
            "image_rotation": 0,
            "value": {
                "points": [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in CORNERS[name]],
                "closed": True,
                "polygonlabels": [name],
            },
        }
        for name in NAMES
    ]
    task = FILES / "label_studio_polygons.json"
    task.write_text(json.dumps([task_of(results)]))
    labels = "".join(f'<Label value="{name}"/>' for name in NAMES)
    config = f"""<View><Image name="image" value="$image"/>
        <PolygonLabels name="tag" toName="image">{labels}</PolygonLabels></View>"""
    folder = FILES / "yolo"
    shutil.rmtree(folder, ignore_errors=True)
    converter = Converter(config, str(FILES), download_resources=False)
    converter.convert_to_yolo(str(task), str(folder), is_dir=False)
    (folder / "images").mkdir(exist_ok=True)
    (label,) = (folder / "labels").iterdir()
    picture().save(folder / "images" / f"{label.stem}.png")


def with_itk() -> None:
    """What ITK-SNAP and 3D Slicer save, which are built on it, of a picture that it read."""
    picture = sitk.ReadImage(str(FILES / "a.png"))
    flat = sitk.GetImageFromArray(truth())
    flat.CopyInformation(picture)
    volume = sitk.JoinSeries(flat)  # as Slicer holds a picture
    turned = sitk.Flip(sitk.PermuteAxes(volume, [1, 0, 2]), [True, False, False])
    folder = FILES / "itk"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, image in (("flat", flat), ("volume", volume), ("turned", turned)):
        for end in (".nrrd", ".nii.gz"):
            sitk.WriteImage(image, str(folder / f"{name}{end}"), useCompression=True)


def with_nnunet() -> None:
    folder = FILES / "Dataset001_Teeth"
    shutil.rmtree(folder, ignore_errors=True)
    for part, name, image in (
        ("imagesTr", "a_0000.png", picture()),
        ("labelsTr", "a.png", Image.fromarray(truth())),
    ):
        (folder / part).mkdir(parents=True)
        image.save(folder / part / name)
    labels = {"background": 0, "tooth": 1, "filling": 2}
    generate_dataset_json(str(folder), {"0": "X-ray"}, labels, 1, ".png")


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    Image.fromarray(truth()).save(FILES / "truth.png")
    with_datumaro()
    with_cvat()
    with_labelme()
    with_label_studio()
    with_label_studio_converter()
    with_itk()
    with_nnunet()
