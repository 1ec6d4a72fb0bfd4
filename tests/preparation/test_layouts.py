import numpy as np
import pytest

from guided_diffusion.images.masks import read_mask, write_mask
from guided_diffusion.preparation import layouts

LAYOUTS = {
    "one": {"": ("IMG", "MASK")},
    "plain": {"": ("imgs", "masks")},
    "images": {"": ("images", "masks")},
    "split": {
        "TRAIN": ("Split/TRAIN/IMG", "Split/TRAIN/MASK"),
        "VAL": ("Split/VAL/IMG", "Split/VAL/MASK"),
    },
    "train first": {
        "TRAIN": ("train/images", "train/masks"),
        "VAL": ("val/images", "val/masks"),
        "TEST": ("test/images", "test/masks"),
    },
    "images first": {"TRAIN": ("images/train", "masks/train"), "VAL": ("images/val", "masks/val")},
    "all": {
        "TRAIN": ("all/train/imgs", "all/train/masks"),
        "VAL": ("all/val/imgs", "all/val/masks"),
        "TEST": ("all/test/imgs", "all/test/masks"),
    },
    "side by side": {"TRAIN": ("all/train", "all/train"), "VAL": ("all/val", "all/val")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    expected = set()
    for split, (image_dir, mask_dir) in LAYOUTS[layout].items():
        for number in range(2):
            stem = f"{split.lower() or 'film'}{number}"
            mask = np.full((4, 4), number, np.uint8)
            suffix = "_mask" if image_dir == mask_dir or number else ""
            write_mask(f"{tmp_path}/{image_dir}/{stem}.png", mask)
            write_mask(f"{tmp_path}/{mask_dir}/{stem}{suffix}.tif", mask)
            expected.add((split, stem, number))
    items, unpaired = layouts.list_items(layouts.sources(str(tmp_path)))
    assert not unpaired
    assert {(i.split, i.stem, int(read_mask(i.mask)[0, 0])) for i in items} == expected


def test_folders_without_a_data_set(prepare, tmp_path):
    (tmp_path / "empty").mkdir()
    for flags, says in (
        (("--source-dir", tmp_path), "no known layout"),
        (("--source-dir", tmp_path / "nowhere"), "not a folder"),
        ((), "no data set given"),
        (("--mask-dir", tmp_path), "needs the --image-dir"),
        (("--image-dir", tmp_path, "--source-dir", tmp_path), "not both"),
        (("--image-dir", tmp_path / "empty", "--mask-dir", tmp_path / "empty"), "no images"),
    ):
        code, _, error = prepare("--action", "validate", *flags)
        assert code == 2
        assert says in error
        assert error.count("\n") == 1


def test_flags_without_effect_are_refused(prepare, phantoms):
    code, _, error = prepare("--action", "analyze", "--source-dir", phantoms, "--train-images", 3)
    assert code == 2
    assert "--train_images" in error
    code, _, error = prepare("--action", "anlyze", "--source-dir", phantoms)
    assert code == 2
    assert "create-sample" in error
