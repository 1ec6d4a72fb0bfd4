from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.images.files import pair_files
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.masks import read_mask
from guided_diffusion.preparation.phantoms import (
    BACKGROUND,
    BONE,
    CARIES,
    DENTINE,
    ENAMEL,
    OTHER,
    PULP,
    make_phantom,
    write_dataset,
)
from guided_diffusion.runtime.errors import UserError


@pytest.fixture(scope="module")
def small():
    """40 phantoms of 64x64: uint8 [40 x 64 x 64] images and masks."""
    return tuple(np.stack(parts) for parts in zip(*(make_phantom(s, (64, 64)) for s in range(40))))


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (90, 31), (1, 1), (2, 40)])
def test_a_phantom_is_a_function_of_seed_and_size(size):
    image, mask = make_phantom(3, size)
    assert image.shape == mask.shape == size
    assert image.dtype == mask.dtype == np.uint8
    assert mask.max() <= 6
    again = make_phantom(3, size)
    assert np.array_equal(image, again[0])
    assert np.array_equal(mask, again[1])


def test_seeds_differ():
    pictures = {make_phantom(seed, (32, 32))[0].tobytes() for seed in range(20)}
    assert len(pictures) == 20


@pytest.mark.filterwarnings("error")
def test_values_that_rounding_left_below_zero_are_black():
    image, _ = make_phantom(9855708175428278621, (64, 64))
    assert image.std() > 10


def test_size_is_checked():
    with pytest.raises(UserError, match="0x5"):
        make_phantom(0, (0, 5))


def test_every_class_is_seen_at_64_pixels(small):
    _, masks = small
    pixels = np.stack([np.bincount(mask.ravel(), minlength=7) for mask in masks])
    assert pixels.shape[1] == 7
    for index in (BACKGROUND, ENAMEL, BONE, DENTINE, PULP):
        assert (pixels[:, index] >= 40).all()
    for index in (OTHER, CARIES):
        assert (pixels[:, index] >= 5).mean() >= 0.9


def test_grey_levels_are_ordered_as_on_films(small):
    images, masks = small
    grey = [np.median(images[masks == index]) for index in range(7)]
    assert grey[OTHER] > grey[ENAMEL] > grey[DENTINE] > grey[BONE] > grey[BACKGROUND] + 30
    assert grey[DENTINE] > grey[PULP] > grey[BACKGROUND] + 30
    assert grey[DENTINE] > grey[CARIES] > grey[BACKGROUND] + 30


def test_no_grey_level_lookup_solves_the_task(small):
    images, masks = small
    counts = np.zeros((256, 7))
    np.add.at(counts, (images.ravel(), masks.ravel()), 1)
    lookup = counts.argmax(axis=1)[images]  # the best one, chosen on these very pictures
    dice = [
        2 * np.sum((lookup == i) & (masks == i)) / (np.sum(lookup == i) + np.sum(masks == i))
        for i in range(1, 7)
    ]
    assert np.mean(dice) < 0.55


def test_tissues_lie_where_anatomy_has_them():
    for seed in range(4):
        _, mask = make_phantom(seed, (192, 192))
        pairs = np.concatenate(
            [
                np.stack([mask[1:].ravel(), mask[:-1].ravel()]),
                np.stack([mask[:, 1:].ravel(), mask[:, :-1].ravel()]),
            ],
            axis=1,
        )
        touching = np.zeros((7, 7), int)
        np.add.at(touching, tuple(pairs), 1)
        touching += touching.T
        assert touching[PULP, BONE] == touching[PULP, BACKGROUND] == 0
        assert touching[ENAMEL, DENTINE] > 20 * touching[ENAMEL, BONE]
        # Upper bone above, lower bone below, crowns between.
        rows = np.arange(192)[:, None] * np.ones((1, 192))
        assert np.abs(rows[mask == ENAMEL] - 96).max() < np.abs(rows[mask == BONE] - 96).max()
        middle = mask[90:102]
        assert not np.any(middle == BONE)


def test_write_dataset(tmp_path):
    write_dataset(str(tmp_path), 3, 2, 1, size=(20, 30), seed=5)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")}
    assert files == {
        *(f"unlabelled/film_000{i}.png" for i in range(3)),
        *(f"Split/TRAIN/{kind}/train_000{i}.png" for i in range(2) for kind in ("IMG", "MASK")),
        *(f"Split/VAL/{kind}/val_0000.png" for kind in ("IMG", "MASK")),
    }
    pictures = {}
    for name in files:
        with Image.open(Path(tmp_path, name)) as picture:
            assert picture.mode == "L"
            assert picture.size == (30, 20)
            pictures[name] = np.asarray(picture).tobytes()
    films = [pixels for name, pixels in pictures.items() if "MASK" not in name]
    assert len(set(films)) == 6

    other = tmp_path / "other"
    write_dataset(str(other), 1, 0, 0, size=(20, 30), seed=6)
    with Image.open(other / "unlabelled/film_0000.png") as picture:
        assert np.asarray(picture).tobytes() not in films


@pytest.mark.parametrize("action", ["create-sample", "create_sample"])
def test_create_sample(prepare, tmp_path, action):
    code, out, _ = prepare(
        *("--action", action, "--output-dir", tmp_path / "s", "--num-samples", 5),
        *("--image-size", 32, "--seed", 4),
    )
    assert code == 0
    assert "4 in Split/TRAIN, 1 in Split/VAL" in out
    assert len(list((tmp_path / "s/unlabelled").iterdir())) == 5
    ((_, image, mask),) = pair_files(f"{tmp_path}/s/Split/VAL/IMG", f"{tmp_path}/s/Split/VAL/MASK")
    assert read_image(image).shape == read_mask(mask, 7).shape == (32, 32)
    code, _, error = prepare("--action", action, "--output-dir", tmp_path / "t", "--num-samples", 1)
    assert code == 2
    assert "--num_samples 1" in error


@pytest.mark.parametrize("size", [16, 32, 39, 40, 64])
def test_generated_samples_have_no_faults(prepare, tmp_path, size):
    flags = ("--num-samples", 10, "--num-unlabelled", 0, "--image-size", size)
    prepare("--action", "create-sample", "--output-dir", tmp_path / "sample", *flags)
    check = ("--action", "validate", "--source-dir", tmp_path / "sample", "--num-classes", 7)
    code, said, _ = prepare(*check)
    assert code == 0, said
    assert "0 faults" in said
