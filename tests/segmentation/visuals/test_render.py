import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.masks import read_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.segmentation.categories import generic_categories, load_categories
from guided_diffusion.segmentation.visuals import render

TABLE = load_categories()


def squares():
    """Enamel and pulp side by side in background, 30 x 40."""
    mask = np.zeros((30, 40), np.uint8)
    mask[8:22, 5:20] = 1
    mask[8:22, 20:35] = 6
    return mask


@pytest.mark.parametrize("categories", [TABLE, generic_categories(200)], ids=["seven", "many"])
def test_color_masks_show_colors_and_hold_indices(tmp_path, categories):
    mask = np.random.default_rng(0).integers(0, len(categories), (23, 17), dtype=np.uint8)
    path = tmp_path / "sub" / "mask.png"
    render.save_color_mask(str(path), mask, categories)
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), mask)
        colors = np.array([c.color for c in categories])
        assert np.array_equal(np.asarray(picture.convert("RGB")), colors[mask])
    assert np.array_equal(read_mask(str(path), len(categories)), mask)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 9), st.integers(1, 9))
def test_color_masks_of_few_classes_keep_their_indices(first, second, height, width):
    # An encoder that drops unused colours would renumber the classes.
    mask = np.full((height, width), first, np.uint8)
    mask[height // 2 :, width // 2 :] = second
    picture = _written(mask)
    assert np.array_equal(np.asarray(picture), mask)


def _written(mask):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/mask.png"
        render.save_color_mask(path, mask, TABLE)
        with Image.open(path) as picture:
            picture.load()
            return picture


def test_overlay_tints_regions_and_leaves_the_background():
    mask = squares()
    mask[0, :] = IGNORE
    image = np.random.default_rng(0).integers(0, 256, mask.shape, dtype=np.uint8)
    picture = render.overlay(image, mask, TABLE, opacity=0.25)
    assert picture.shape == (30, 40, 3)
    assert picture.dtype == np.uint8
    outside = (mask == 0) | (mask == IGNORE)
    assert np.array_equal(picture[outside], np.repeat(image[outside][:, None], 3, axis=1))
    inner = picture[12, 10].astype(float)
    expected = 0.75 * image[12, 10] + 0.25 * np.array(TABLE[1].color)
    np.testing.assert_allclose(inner, expected, atol=0.51)
    # Borders: nearly the pure colour, one pixel wide, drawn once where two classes meet.
    for row, column, index in ((8, 10, 1), (21, 30, 6), (15, 5, 1), (15, 20, 6)):
        shown = picture[row, column].astype(float)
        expected = 0.1 * image[row, column] + 0.9 * np.array(TABLE[index].color)
        np.testing.assert_allclose(shown, expected, atol=0.51)
    expected = 0.75 * image[15, 19] + 0.25 * np.array(TABLE[1].color)
    np.testing.assert_allclose(picture[15, 19], expected, atol=0.51)


def test_overlay_takes_float_and_colour_images():
    mask = squares()
    grey = np.random.default_rng(0).integers(0, 256, mask.shape, dtype=np.uint8)
    expected = render.overlay(grey, mask, TABLE)
    for image in (grey / np.float32(255), np.repeat(grey[..., None], 3, axis=2), grey[..., None]):
        assert np.array_equal(render.overlay(image, mask, TABLE), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_overlay_of_tiny_pictures(shape):
    assert render.overlay(np.zeros(shape, np.uint8), np.ones(shape, np.uint8), TABLE).any()


def test_overlay_refuses_sizes_that_differ():
    with pytest.raises(UserError, match="30x41 and a mask of 30x40"):
        render.overlay(np.zeros((30, 41), np.uint8), squares(), TABLE)


def test_legend_names_the_classes_that_are_there():
    image, mask = np.zeros((30, 40), np.uint8), squares()
    plain = render.overlay(image, mask, TABLE)
    with_legend = render.overlay(image, mask, TABLE, legend=True)
    strip = with_legend[30:]
    assert np.array_equal(with_legend[:30, :40], plain)
    for index in range(1, 7):
        drawn = (strip == TABLE[index].color).all(axis=-1).any()
        assert drawn == (index in (1, 6))
    empty = np.zeros_like(mask)
    assert render.overlay(image, empty, TABLE, legend=True).shape == (30, 40, 3)


def test_a_grid_keeps_every_picture():
    pictures = np.stack([np.full((5, 7, 3), 40 * k, np.uint8) for k in range(1, 6)])
    grid = image_grid(pictures, columns=3)
    assert grid.shape == (2 * 7 + 2, 3 * 9 + 2, 3)
    assert np.array_equal(grid[2:7, 2:9], np.full((5, 7, 3), 40))
    assert np.array_equal(grid[9:14, 11:18], np.full((5, 7, 3), 200))


def test_comparison_has_one_row_per_radiograph():
    images = [np.full((30, 40), k, np.uint8) for k in (90, 180)]
    masks = [(squares(), np.zeros_like(squares()))] * 2
    grid = render.comparison(images, masks, TABLE)
    assert grid.shape == (2 * 32 + 2, 3 * 42 + 2, 3)
    assert np.array_equal(grid[2:32, 44:84], render.overlay(images[0], squares(), TABLE))
    assert np.array_equal(grid[34:64, 86:126], np.full((30, 40, 3), 180))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_curves(tmp_path, drawn):
    log = tmp_path / "log.csv"
    log.write_text(
        "epoch,loss,val_mean_dice,val_dice_enamel,val_iou_enamel\n1,2.0,,,\n2,1.0,0.5,0.4,n/a\n"
        "3,0.5,0.6,0.7,0.2\n"
    )
    target = tmp_path / "curves.png"
    for _ in range(2):  # the second time over the first
        render.plot_curves(str(log), str(target), TABLE)
        with Image.open(target) as picture:
            picture.load()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "log.csv"]
    panels = {axes.get_title(): axes for axes in drawn[-1].axes}
    assert list(panels) == ["Loss", "Dice", "IoU"]
    curves = {
        line.get_label(): line.get_xydata().tolist()
        for axes in panels.values()
        for line in axes.lines
    }
    assert curves == {
        "loss": [[1, 2], [2, 1], [3, 0.5]],
        "val_mean_dice": [[2, 0.5], [3, 0.6]],
        "val_dice_enamel": [[2, 0.4], [3, 0.7]],
        "val_iou_enamel": [[3, 0.2]],
    }
    enamel = next(li for li in panels["Dice"].lines if li.get_label() == "val_dice_enamel")
    assert enamel.get_color()[0] > 0.8
    assert enamel.get_color()[1:] == (0, 0)


def test_curves_without_an_epoch_column_or_without_rows(tmp_path, drawn):
    log = tmp_path / "log.csv"
    log.write_text("loss,other\n2.0,1\n1.0,1\n")
    render.plot_curves(str(log), str(tmp_path / "a.png"))
    assert drawn[-1].axes[0].lines[0].get_xydata().tolist() == [[1, 2], [2, 1]]
    log.write_text("epoch,other\n1,1\n")
    with pytest.raises(UserError, match=r"log\.csv has no column"):
        render.plot_curves(str(log), str(tmp_path / "a.png"))
    log.write_text("")
    with pytest.raises(UserError, match=r"log\.csv has no column"):
        render.plot_curves(str(log), str(tmp_path / "a.png"))
    log.write_text("loss\n1\n")
    with pytest.raises(UserError, match=r"end.* in \.png"):
        render.plot_curves(str(log), str(tmp_path / "a.pdf"))


def test_confusion_picture(tmp_path, drawn):
    confusion = np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    render.plot_confusion(confusion, generic_categories(3), str(tmp_path / "c.png"))
    axes = drawn[-1].axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown, [[80, 20, 0], [25, 75, 0], [0, 0, 0]])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["background", "class 1", "class 2"]
