import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from images_util import COLOUR, write_png
from PIL import Image

from guided_diffusion.images.image_io import ImageError
from guided_diffusion.images.masks import read_mask
from guided_diffusion.preparation.phantoms import make_phantom
from guided_diffusion.segmentation.categories import generic_categories, load_categories
from guided_diffusion.segmentation.visuals.color_masks import (
    indices_from_colors,
    read_color_mask,
    unknown_colors,
)
from guided_diffusion.segmentation.visuals.render import palette, save_color_mask

TABLE = load_categories()
COLORS = palette(TABLE)


@pytest.fixture
def run(script):
    """Run the tool: (exit code, stdout, stderr)."""
    return functools.partial(script, "rgb2tif.py")


def save_rgb(path, colors):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).save(path)


@pytest.fixture
def drawn(tmp_path):
    """Three phantom masks in colours: RGB PNG, palette PNG, RGBA TIFF in a sub-folder."""
    masks = {name: make_phantom(i, (40, 60))[1] for i, name in enumerate(("a", "b", "sub/c"))}
    source = tmp_path / "drawn"
    save_rgb(source / "a.png", COLORS[masks["a"]])
    save_color_mask(str(source / "b.png"), masks["b"], TABLE)
    opaque = np.full((40, 60, 1), 255, np.uint8)
    save_rgb(source / "sub/c.tiff", np.concatenate([COLORS[masks["sub/c"]], opaque], axis=2))
    (source / "notes.txt").write_text("not a mask")
    return source, masks


@pytest.mark.parametrize(("flags", "ending"), [((), ".tif"), (("--format", "png"), ".png")])
def test_a_folder_is_mirrored(run, drawn, tmp_path, flags, ending):
    source, masks = drawn
    code, out, _ = run(source, tmp_path / "index", *flags)
    assert code == 0
    assert "3 masks written" in out
    written = sorted(p for p in (tmp_path / "index").rglob("*") if p.is_file())
    names = [p.relative_to(tmp_path / "index").as_posix() for p in written]
    assert names == [name + ending for name in masks]
    for path, mask in zip(written, masks.values()):
        assert np.array_equal(read_mask(str(path), 7), mask)
        with Image.open(path) as picture:
            assert picture.mode == "L"
    _, out, _ = run(source, tmp_path / "index", *flags)
    assert "3 of them replacing existing files" in out


def test_a_file_goes_to_a_file_or_into_a_folder(run, drawn, tmp_path):
    source, masks = drawn
    assert run(source / "a.png", tmp_path / "x.tif")[0] == 0
    assert run(source / "a.png", tmp_path / "y.png")[0] == 0
    assert run(source / "a.png", tmp_path / "folder")[0] == 0
    for written in ("x.tif", "y.png", "folder/a.tif"):
        assert np.array_equal(read_mask(str(tmp_path / written)), masks["a"])


def spoil(source, masks):
    """41 pixels of three colours that no class has."""
    colors = COLORS[masks["a"]].copy()
    colors[0, :30] = (250, 5, 5)
    colors[1, :10] = (1, 2, 3)
    colors[2, 0] = (0, 0, 200)
    save_rgb(source / "a.png", colors)


def test_colours_of_no_class_are_refused_before_anything_is_written(run, drawn, tmp_path):
    source, masks = drawn
    spoil(source, masks)
    code, _, error = run(source, tmp_path / "index")
    assert code == 2
    assert error.count("\n") == 1
    for part in ("a.png", "(250, 5, 5) 30 pixels", "(1, 2, 3) 10 pixels", "(0, 0, 200) 1 pixel"):
        assert part in error
    assert "b.png" not in error
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("unknown", "classes"), [("nearest", (1, 0, 3)), ("background", (0, 0, 0))]
)
def test_colours_of_no_class_can_be_replaced(run, drawn, tmp_path, unknown, classes):
    source, masks = drawn
    spoil(source, masks)
    code, out, _ = run(source, tmp_path / "index", "--unknown", unknown)
    assert code == 0
    assert "41 pixels" in out
    assert "a.png" in out
    expected = masks["a"].copy()
    expected[0, :30], expected[1, :10], expected[2, 0] = classes
    assert np.array_equal(read_mask(str(tmp_path / "index/a.tif")), expected)


def test_index_masks_are_recognised_in_the_message(run, drawn, tmp_path):
    _, masks = drawn
    save_rgb(tmp_path / "grey/a.png", masks["a"])
    code, _, error = run(tmp_path / "grey", tmp_path / "index")
    assert code == 2
    assert "class indices already" in error


def test_another_class_table(run, tmp_path):
    table = tmp_path / "c.json"
    table.write_text(
        json.dumps(
            [
                {"index": 0, "name": "air", "color": [10, 20, 30]},
                {"index": 1, "name": "lung", "color": [40, 50, 60]},
            ]
        )
    )
    colors = np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)
    save_rgb(tmp_path / "a.png", colors)
    assert run(tmp_path / "a.png", tmp_path / "b.png", "--categories", table)[0] == 0
    assert read_mask(str(tmp_path / "b.png")).tolist() == [[0, 1]]


def test_overwriting_is_refused(run, drawn, tmp_path):
    source, _ = drawn
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for target, says in (
        (source, "lies in"),
        (source / "index", "lies in"),
        (source / "a.png", "name a folder"),
    ):
        code, _, error = run(source, target)
        assert code == 2
        assert says in error
    code, _, error = run(source / "a.png", source / "a.png")
    assert code == 2
    assert "overwritten" in error
    save_rgb(source / "a.bmp", COLORS[np.zeros((4, 4), np.uint8)])
    code, _, error = run(source, tmp_path / "index")
    assert code == 2
    assert "a.bmp" in error
    assert "a.png" in error
    (source / "a.bmp").unlink()
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_16_bit_files_and_broken_files_are_named(run, tmp_path):
    save_rgb(tmp_path / "in/deep.png", np.zeros((4, 4), np.uint16))
    code, _, error = run(tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert "deep.png" in error
    (tmp_path / "in/deep.png").write_bytes(b"nothing")
    code, _, error = run(tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert "deep.png" in error


def test_colours_widened_to_16_bits(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, (COLOUR * np.uint16(257)).astype(">u2"), colour_type=2)
    assert np.array_equal(read_color_mask(str(path)), COLOUR)
    write_png(path, (COLOUR * np.uint16(256)).astype(">u2"), colour_type=2)
    with pytest.raises(ImageError, match="more than 8 bits per channel"):
        read_color_mask(str(path))


@given(st.integers(0, 10**6), st.sampled_from([2, 7, 30, 255]))
def test_colours_and_back_is_the_identity(seed, num_classes):
    table = generic_categories(num_classes)
    mask = np.random.default_rng(seed).integers(0, num_classes, (7, 9), dtype=np.uint8)
    colors = np.array([c.color for c in table], np.uint8)[mask]
    assert unknown_colors(colors, table) == {}
    for unknown in ("nearest", "background"):
        assert np.array_equal(indices_from_colors(colors, table, unknown), mask)


def test_nearest_is_the_nearest_of_many_colours():
    colors = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    table = COLORS[:7].astype(int)
    distance = ((colors[:, :, None].astype(int) - table) ** 2).sum(axis=-1)
    assert np.array_equal(indices_from_colors(colors, TABLE), distance.argmin(axis=-1))
