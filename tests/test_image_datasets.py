import inspect
import os
import random
from itertools import islice

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import image_datasets
from guided_diffusion.image_datasets import (
    ImageDataset,
    center_crop_arr,
    class_names,
    load_data,
    random_crop_arr,
    sample_is_grey,
)
from guided_diffusion.images import cache as image_cache
from guided_diffusion.images.files import list_images
from guided_diffusion.images.image_io import ImageError
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import UserError

COUNT = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """11 grey images in two classes, each with its own brightness and darker on the right."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for number in range(COUNT):
        picture = np.full((20 + number, 30), 20 * number + 20, np.uint8)
        picture[:, 15:] -= 10
        name = f"{'dog' if number % 3 else 'cat'}_{number:02}.png"
        Image.fromarray(picture).save(folder / ("sub" if number % 2 else ".") / name)
    return str(folder)


def batches(folder, count, **options):
    options = {"batch_size": 4, "image_size": 8, "random_flip": False, **options}
    return list(islice(load_data(data_dir=folder, **options), count))


def brightness(images):
    """The number of each image, from its brightness: [N]."""
    levels = (images.mean(dim=(1, 2, 3)) + 1) * 127.5
    return ((levels - 15) / 20).round().int().tolist()


def test_what_a_batch_is(folder):
    (images, labels), *_ = batches(folder, 1)
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == th.float32
    assert images.is_contiguous()
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels == {}
    grey = batches(folder, 1, reading=ReadingConfig(99, 1, "squash"))[0][0]
    assert grey.shape == (4, 1, 8, 8)
    wide = batches(folder, 1, image_size=(8, 12))[0][0]
    assert wide.shape == (4, 3, 8, 12)


def test_signatures_hold_the_contracts_names():
    names = ["data_dir", "batch_size", "image_size", "class_cond", "deterministic"]
    names += ["random_crop", "random_flip"]
    assert list(inspect.signature(load_data).parameters)[:7] == names
    names = ["resolution", "image_paths", "classes", "shard", "num_shards"]
    names += ["random_crop", "random_flip"]
    assert list(inspect.signature(ImageDataset).parameters)[:7] == names


def test_every_epoch_shows_every_image_once_in_a_new_order(folder):
    seen = [n for images, _ in batches(folder, 2 * COUNT) for n in brightness(images)]
    epochs = [seen[start : start + COUNT] for start in range(0, len(seen), COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    other = [n for images, _ in batches(folder, 3, seed=1) for n in brightness(images)]
    assert other != seen[:12]


def test_deterministic_order_is_that_of_the_names(folder):
    seen = [n for i, _ in batches(folder, 3, deterministic=True) for n in brightness(i)]
    names = sorted(
        os.path.relpath(os.path.join(r, f), folder) for r, _, fs in os.walk(folder) for f in fs
    )
    expected = [int(name[-6:-4]) for name in names]
    assert seen == [*expected, expected[0]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", "ram", "auto"])
def test_a_batch_depends_on_seed_rank_and_step_alone(folder, workers, cache):
    plain = batches(folder, 9, random_flip=True, class_cond=True, seed=3)
    options = {"num_workers": workers, "cache": cache, "class_cond": True, "seed": 3}
    th.manual_seed(workers)
    random.seed(workers)
    resumed = batches(folder, 4, random_flip=True, start_step=5, **options)
    for (one, label), (other, other_label) in zip(plain[5:], resumed, strict=True):
        assert th.equal(one, other)
        assert th.equal(label["y"], other_label["y"])
    every = batches(folder, 9, random_flip=True, **options)
    assert all(th.equal(one[0], other[0]) for one, other in zip(plain, every, strict=True))


def test_reading_draws_nothing_from_the_global_generators(folder):
    th.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = th.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    th.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    batches(folder, 2, random_flip=True, num_workers=1)
    batches(folder, 2, random_crop=True)
    assert th.equal(expected[0], th.rand(3))
    assert expected[1:] == (random.random(), np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_together_see_what_one_would(folder, ranks):
    whole = batches(folder, 6, batch_size=8, random_flip=True)
    parts = [
        batches(folder, 6, batch_size=8 // ranks, random_flip=True, rank=r, num_ranks=ranks)
        for r in range(ranks)
    ]
    for step, (images, _) in enumerate(whole):
        assert th.equal(images, th.cat([part[step][0] for part in parts]))


def test_flips_mirror_about_half_and_only_if_requested(folder):
    def mirrored(images):
        return (images[..., :2].mean(dim=(1, 2, 3)) < images[..., -2:].mean(dim=(1, 2, 3))).tolist()

    seen = [images for images, _ in batches(folder, 30, random_flip=True)]
    flips = [m for images in seen for m in mirrored(images)]
    assert 0.35 < np.mean(flips) < 0.65
    # each image is mirrored in some epochs and not in others
    numbers = [n for images in seen for n in brightness(images)]
    assert len(set(zip(numbers, flips, strict=True))) == 2 * COUNT
    assert not any(m for images, _ in batches(folder, 10) for m in mirrored(images))


def test_random_crops_differ_and_stay_within_the_picture(folder):
    first = batches(folder, 4, random_crop=True)
    again = batches(folder, 4, random_crop=True)
    assert all(th.equal(one[0], other[0]) for one, other in zip(first, again, strict=True))
    assert not th.equal(first[0][0], batches(folder, 1)[0][0])
    widths = {
        int((i[0, 0] > i[0, 0].mean()).sum(1)[0]) for images, _ in first for i in images[None]
    }
    assert len(widths) > 1


def test_labels_are_the_names_up_to_the_underscore(folder):
    (images, labels), *_ = batches(folder, 1, class_cond=True)
    assert labels["y"].dtype == th.int64
    assert labels["y"].tolist() == [int(n % 3 > 0) for n in brightness(images)]
    assert class_names(["b/dog_1.png", "a/cat_2.png", "dog_3.png"]) == ["cat", "dog"]


def test_too_few_images(folder):
    with pytest.raises(UserError, match=r"11 images, fewer than the 12 .*6 on each of 2 ranks"):
        load_data(data_dir=folder, batch_size=6, image_size=8, rank=0, num_ranks=2)
    assert len(batches(folder, 1, batch_size=11)[0][0]) == 11


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": "disk"}, "cache 'disk'"),
        ({"cache": "ram", "random_crop": True}, "--cache none"),
        ({"random_crop": True, "reading": ReadingConfig(8, 3, "pad")}, "--resize crop"),
        ({"reading": ReadingConfig(8, 3, "native")}, "native"),
        ({"data_dir": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_errors_are_raised_at_once(folder, options, said):
    with pytest.raises(UserError, match=said):
        load_data(**{"data_dir": folder, "batch_size": 2, "image_size": 8, **options})


@pytest.fixture
def spoilt(folder, tmp_path):
    """5 good pictures and 2 bad ones."""
    for number in range(5):
        Image.fromarray(np.full((9, 9), 20 * number + 15, np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    (tmp_path / "3b.png").write_text("bad")
    (tmp_path / "zz.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_raises_one_clean_error(spoilt, workers):
    with pytest.raises(ImageError) as caught:
        batches(spoilt, 3, batch_size=3, num_workers=workers)
    assert spoilt in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_listed_if_requested(spoilt, workers, capsys):
    options = {"batch_size": 3, "skip_bad_images": True, "num_workers": workers}
    reported = []
    seen = batches(spoilt, 7, on_skip=reported.append, **options)
    assert sorted(os.path.basename(line.split()[0]) for line in reported) == [
        "3b.png",
        "zz.png",
    ]
    assert {n for images, _ in seen for n in brightness(images)} == set(range(5))
    resumed = batches(spoilt, 3, start_step=4, **options)
    assert all(th.equal(one[0], other[0]) for one, other in zip(seen[4:], resumed, strict=True))
    assert capsys.readouterr().err.count("skipped: ") in (1, 2)


def test_no_readable_image(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("bad")
    with pytest.raises(ImageError, match="not one image could be read"):
        batches(str(tmp_path), 1, batch_size=2, skip_bad_images=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_reads_every_file_once(folder, workers, tmp_path, monkeypatch):
    read = image_datasets.read_image
    log = tmp_path / "log"

    def logged(path, *args):
        with open(log, "a") as file:
            file.write(path + "\n")
        return read(path, *args)

    monkeypatch.setattr(image_datasets, "read_image", logged)
    batches(folder, 3 * COUNT, batch_size=1, cache="ram", num_workers=workers)
    lines = log.read_text().split()
    assert len(set(lines)) == COUNT
    # two workers may load the same image at once when an epoch ends
    assert len(lines) <= COUNT + workers
    log.unlink()
    batches(folder, 3 * COUNT, batch_size=1, cache="none", num_workers=workers)
    assert len(log.read_text().split()) >= 3 * COUNT


def test_the_cache_is_not_written_to_by_flips(folder):
    one = batches(folder, 12, random_flip=True, cache="ram")
    other = batches(folder, 12, random_flip=True, cache="none")
    assert all(th.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("free", "shared"), [(1000, 10**9), (10**9, 1000)])
def test_the_cache_is_not_larger_than_memory(folder, monkeypatch, free, shared):
    monkeypatch.setattr(image_cache, "_free_memory", lambda _: (free, shared))
    with pytest.raises(UserError, match=r"--cache ram needs .* for 11 images"):
        batches(folder, 1, cache="ram", num_workers=1)
    assert len(batches(folder, 1, cache="auto")) == 1


class TestImageDataset:
    def paths(self, folder):
        return list_images(folder)

    def test_items(self, folder):
        paths = self.paths(folder)
        dataset = ImageDataset(8, paths, classes=list(range(COUNT)), random_flip=False)
        image, labels = dataset[4]
        assert len(dataset) == COUNT
        assert image.shape == (3, 8, 8)
        assert image.dtype == np.float32
        assert labels == {"y": 4}
        assert isinstance(labels["y"], np.int64)
        expected = center_crop_arr(Image.open(paths[4]).convert("RGB"), 8)
        np.testing.assert_allclose(image, expected.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
        assert ImageDataset(8, paths)[0][1] == {}

    def test_shards_divide_the_files(self, folder):
        paths = self.paths(folder)
        shards = [ImageDataset(8, paths, shard=s, num_shards=3) for s in range(3)]
        assert shards[1].paths == paths[1::3]
        assert sorted(path for shard in shards for path in shard.paths) == sorted(paths)
        labelled = ImageDataset(8, paths, list(range(COUNT)), 1, 3)
        assert labelled[1][1]["y"] == 4

    def test_flips_and_crops_come_from_pythons_generator(self, folder):
        dataset = ImageDataset(8, self.paths(folder), random_crop=True, random_flip=True)
        random.seed(5)
        first = [dataset[0][0] for _ in range(6)]
        random.seed(5)
        again = [dataset[0][0] for _ in range(6)]
        assert all(np.array_equal(a, b) for a, b in zip(first, again))
        assert any(not np.array_equal(first[0], other) for other in first)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (9, 200), (3, 5)])
def test_crops_are_squares_of_the_picture(size):
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    picture = Image.fromarray(np.dstack([rows, columns, rows * 0 + 7]).astype(np.uint8))
    centre = center_crop_arr(picture, 16)
    assert centre.shape == (16, 16, 3)
    assert (centre[..., 2] == 7).all()
    rng = random.Random(0)
    heights = set()
    for _ in range(40):
        crop = random_crop_arr(picture, 16, 0.5, 1.0, rng)
        assert crop.shape == (16, 16, 3)
        assert (np.diff(crop[:, 0, 0].astype(int)) >= 0).all()
        heights.add(int(crop[-1, 0, 0]) - int(crop[0, 0, 0]))
    # from half of the short side to all of it
    short = min(size)
    assert max(heights) <= short
    if short > 5:
        assert min(heights) < 0.7 * short < 0.9 * short < max(heights) + 2


def test_a_sample_tells_grey_from_colour(tmp_path):
    paths = []
    for number in range(100):
        paths.append(str(tmp_path / f"{number:03}.png"))
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(paths[-1])
    assert sample_is_grey(paths)
    (tmp_path / "000.png").write_text("unreadable")
    assert sample_is_grey(paths)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(paths[-1])
    assert not sample_is_grey(paths)
    assert sample_is_grey(paths[:-1], how_many=5)
    assert not sample_is_grey(paths, how_many=2)
    assert not sample_is_grey(paths[:1])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Images of blocks whose grey level is 100 times their class."""
    base = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    for number in range(6):
        mask = np.zeros((24 + number, 40), np.uint8)
        top, left = generator.integers(2, 12, 2)
        mask[top : top + 10, left : left + 9] = 1
        mask[top : top + 10, left + 9 : left + 16] = 2
        for part, picture in (("IMG", mask * 100), ("MASK", mask)):
            (base / part / "sub").mkdir(parents=True, exist_ok=True)
            name = f"sub/r{number}.png" if number % 2 else f"r{number}.png"
            Image.fromarray(picture).save(base / part / name)
    return base


class TestMasks:
    @pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
    @pytest.mark.parametrize("moving", [False, True])
    def test_they_share_their_images_geometry(self, pairs, resize, moving):
        options = {"reading": ReadingConfig(16, 1, resize), "mask_dir": str(pairs / "MASK")}
        options |= {"random_crop": moving and resize == "crop", "random_flip": moving}
        seen = set()
        for images, cond in batches(str(pairs / "IMG"), 6, image_size=16, **options):
            assert cond["mask"].shape == (4, 16, 16)
            assert cond["mask"].dtype == th.uint8
            classes = ((images[:, 0] + 1) * 127.5 / 100).round()
            known = cond["mask"] != 255
            assert bool((~known).any()) == (resize == "pad")
            agree = (classes == cond["mask"])[known].float().mean()
            assert agree > 0.85  # all but where the image's edges are blurred
            seen |= {mask.numpy().tobytes() for mask in cond["mask"]}
        assert len(seen) > 6 if moving else len(seen) == 6

    @pytest.mark.parametrize("options", [{"cache": "ram"}, {"num_workers": 2}])
    def test_cache_and_workers_change_nothing(self, pairs, options):
        common = {"reading": ReadingConfig(16, 1), "image_size": 16, "random_flip": True}
        common["mask_dir"] = str(pairs / "MASK")
        plain = batches(str(pairs / "IMG"), 3, **common)
        other = batches(str(pairs / "IMG"), 3, **common, **options)
        for (images, cond), (same, also) in zip(plain, other):
            assert th.equal(images, same)
            assert th.equal(cond["mask"], also["mask"])

    def test_items_of_a_dataset_with_masks(self, pairs):
        paths = [str(pairs / part / "r0.png") for part in ("IMG", "MASK")]
        dataset = ImageDataset(16, paths[:1], random_flip=False, mask_paths=paths[1:])
        image, cond = dataset[0]
        assert image.shape == (3, 16, 16)
        assert cond["mask"].shape == (16, 16)

    def test_unsuitable_masks_are_refused(self, pairs, tmp_path):
        with pytest.raises(ImageError, match=r"r\d.png holds the values {0, 1, 2}; 2 classes"):
            batches(str(pairs / "IMG"), 1, mask_dir=str(pairs / "MASK"), mask_classes=2)
        (tmp_path / "M").mkdir()
        with pytest.raises(UserError, match="no images in"):
            batches(str(pairs / "IMG"), 1, mask_dir=str(tmp_path / "M"))
        for path in (pairs / "IMG").rglob("*.png"):
            target = tmp_path / "M" / path.relative_to(pairs / "IMG")
            target.parent.mkdir(exist_ok=True)
            Image.new("L", (7, 9)).save(target)
        with pytest.raises(ImageError, match=r"9x7 pixels .* export the mask at the radiograph's"):
            batches(str(pairs / "IMG"), 1, mask_dir=str(tmp_path / "M"))
