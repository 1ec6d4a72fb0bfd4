"""Pictures for people: colour masks, overlays, comparisons, training curves, windows."""

import csv
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.images.files import open_file
from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import save_picture
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import write_atomically
from guided_diffusion.sampling.pictures import image_grid
from guided_diffusion.segmentation.categories import Category

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IGNORE_COLOR = (128, 128, 128)
_INK = (235, 235, 235)
_PAPER = (24, 24, 24)


def palette(categories: Sequence[Category]) -> np.ndarray:
    """The colour of each mask value, uint8 [256 x 3]; IGNORE is grey, unused values are black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[IGNORE] = _IGNORE_COLOR
    for category in categories:
        colors[category.index] = category.color
    return colors


def save_color_mask(path: str, mask: np.ndarray, categories: Sequence[Category]) -> None:
    """Write uint8 [H x W] as a palette PNG, which shows colours and stores the class indices."""
    picture = Image.fromarray(mask.astype(np.uint8)).convert("L")
    picture.putpalette(palette(categories).tobytes())
    save_picture(path, picture, optimize=True)


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    categories: Sequence[Category],
    opacity: float = 0.3,
    legend: bool = False,
) -> np.ndarray:
    """Lay the classes over a radiograph, uint8 [H x W x 3]; the background stays as it is.

    Regions are tinted and their borders drawn inside them in full colour, so that thin structures
    stay visible and bright ones do not drown the tint.

    :param image: [H x W] or [H x W x 3], uint8 or float in [0, 1].
    :param mask: class indices [H x W].
    :param opacity: of the tint, 0 to 1.
    :param legend: add a strip below that names the classes in the picture.
    """
    base = _as_rgb(image).astype(np.float32)
    if base.shape[:2] != mask.shape:
        raise UserError(
            f"an image of {base.shape[0]}x{base.shape[1]} and a mask of "
            f"{mask.shape[0]}x{mask.shape[1]} pixels cannot be laid over each other"
        )
    colors = palette(categories)[mask].astype(np.float32)
    weight = np.where((mask > 0) & (mask != IGNORE), np.float32(opacity), 0)
    weight[_borders(mask, width=max(1, round(min(mask.shape) / 500)))] = 0.9
    blended = base + (colors - base) * weight[..., None]
    picture = np.rint(blended).astype(np.uint8)
    return add_legend(picture, mask, categories) if legend else picture


def heat(values: np.ndarray) -> np.ndarray:
    """Values [H x W] from 0 (black) over purple and orange to 1 (pale yellow): uint8 [H x W x 3].

    The scale is fixed, so that pictures compare.
    """
    from matplotlib import colormaps

    colors = (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return colors[np.rint(values.clip(0, 1) * 255).astype(np.uint8)]


def _as_rgb(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8:
        image = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    if image.ndim == 2:
        image = image[..., None]
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _borders(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a class that lie within `width` of another class, bool [H x W].

    Where two classes meet, only the one with the higher index is outlined: the line stays thin.
    """
    line = np.zeros(mask.shape, bool)
    classes = np.where(mask == IGNORE, 0, mask)
    for axis in (0, 1):
        for step in range(1, min(width, mask.shape[axis] - 1) + 1):
            here, there = (classes.swapaxes(0, axis)[s] for s in (np.s_[step:], np.s_[:-step]))
            edge = line.swapaxes(0, axis)
            edge[step:] |= here > there
            edge[:-step] |= there > here
    return line


def add_legend(picture: np.ndarray, mask: np.ndarray, categories: Sequence[Category]) -> np.ndarray:
    """Append a strip with the names and colours of the foreground classes that `mask` holds.

    A picture narrower than a name is widened by a dark margin.
    """
    shown = [c for c in categories if c.index > 0 and np.any(mask == c.index)]
    if not shown:
        return picture
    size = int(np.clip(picture.shape[1] / 30, 10, 40))
    font = ImageFont.load_default(size)
    gap, row = size // 2, round(1.5 * size)
    widths = [round(font.getlength(c.name)) + row + 2 * gap for c in shown]
    width = max(picture.shape[1], *widths)
    places, x, y = [], 0, 0
    for needed in widths:
        if x and x + needed > width:
            x, y = 0, y + row
        places.append((x, y))
        x += needed
    strip = Image.new("RGB", (width, y + row), _PAPER)
    draw = ImageDraw.Draw(strip)
    for category, (x, y) in zip(shown, places):
        square = (x + gap, y + row // 4, x + gap + size, y + row // 4 + size)
        draw.rectangle(square, fill=category.color, outline=_INK)
        draw.text((x + gap + row, y + row / 2), category.name, _INK, font, anchor="lm")
    margin = ((0, 0), (0, width - picture.shape[1]), (0, 0))
    body = [np.pad(picture[..., c], margin[:2], constant_values=_PAPER[c]) for c in range(3)]
    return np.concatenate([np.stack(body, axis=-1), np.asarray(strip)])


def comparison(
    images: Sequence[np.ndarray],
    masks: Sequence[Sequence[np.ndarray]],
    categories: Sequence[Category],
) -> np.ndarray:
    """One row per radiograph: the image, then each of its masks laid over it; uint8 [H' x W' x 3].

    :param images: N radiographs of one size.
    :param masks: for each radiograph the same number of masks, such as (true, predicted).
    """
    pictures = []
    for image, laid in zip(images, masks):
        pictures += [image, *(overlay(image, mask, categories) for mask in laid)]
    stack = np.stack([_as_rgb(picture) for picture in pictures])
    return image_grid(stack, columns=len(pictures) // len(images))


def show(name: str, image: np.ndarray, mask: np.ndarray, categories: Sequence[Category]) -> None:
    """Show a radiograph and its classes side by side in a window, until it is closed.

    :raises UserError: if there is no screen.
    """
    import matplotlib.pyplot as plt

    interactive = plt.get_backend().lower() not in ("agg", "pdf", "svg", "ps", "template")
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not interactive or (sys.platform.startswith("linux") and not screen):
        raise UserError("--viz needs a screen: leave it out and open OUTPUT/OVERLAY instead")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    figure.suptitle(name)
    left.imshow(image, cmap="gray")
    right.imshow(overlay(image, mask, categories, legend=True))
    for axes in (left, right):
        axes.set_axis_off()
    plt.show()


class NothingToPlot(UserError):
    """A log without a column to plot."""


def plot_curves(csv_path: str, png_path: str, categories: Sequence[Category] = ()) -> None:
    """Plot a training log: a panel each for the columns whose names contain loss, dice and iou.

    The horizontal axis is the column `epoch`, else `step`, else the row number. Empty cells are
    skipped. A curve whose name ends with a class has the class's colour, a mean is black.

    :raises NothingToPlot: if the log has no such column.
    """
    with open_file(csv_path) as file:
        text = file.read().decode(errors="replace").replace("\0", "")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise NothingToPlot(f"{csv_path} is damaged: no table of a training log") from error
    names = [name for name in (rows[0] if rows else {}) if name]
    panels = {
        title: [name for name in names if title.lower() in name.lower()]
        for title in ("Loss", "Dice", "IoU")
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise NothingToPlot(f"{csv_path} has no column of a loss, Dice or IoU: nothing to plot")
    x_name = next((name for name in ("epoch", "step") if name in names), "row")
    x_values = [_number(row.get(x_name, "")) for row in rows]
    if x_name == "row":
        x_values = list(range(1, len(rows) + 1))

    figure = new_figure(6 * len(panels), 4.5)
    for axes, (title, curves) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items()
    ):
        for name in sorted(curves):
            points = [(x, _number(row.get(name))) for x, row in zip(x_values, rows)]
            points = [p for p in points if np.isfinite(p).all()]
            style = _curve_style(name, categories) if title != "Loss" else {}
            marker = "." if len(points) < 40 else None
            axes.plot(*np.array(points).reshape(-1, 2).T, label=name, marker=marker, **style)
        axes.set(title=title, xlabel=x_name)
        if title != "Loss":
            axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, png_path)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _curve_style(name: str, categories: Sequence[Category]) -> dict[str, Any]:
    """How to draw a class's curve; the longest name first, so that "left lung" is not "lung"."""
    if "mean" in name.lower():
        return {"color": "black", "linewidth": 2.5}
    for category in sorted(categories, key=lambda c: -len(c.name)):
        if name.endswith(category.name):
            return {
                "color": curve_color(category),
                "linestyle": ":" if category.index == 0 else "-",
            }
    return {}


def curve_color(category: Category) -> tuple[float, ...]:
    """The colour of a class's curve: its own, darkened, as bright yellow is lost on white."""
    return tuple(v / 255 * 0.85 for v in category.color)


def plot_confusion(confusion: np.ndarray, categories: Sequence[Category], png_path: str) -> None:
    """Plot a confusion matrix [C x C], each row in percent of its true class's pixels."""
    rows = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    count = len(categories)
    side = 2.5 + 0.6 * min(count, 30)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    shown = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    names = [category.name for category in categories]
    axes.set_xticks(range(count), names, rotation=45, ha="right")
    axes.set_yticks(range(count), names)
    axes.set(xlabel="predicted", ylabel="true")
    if count <= 30:
        for row, column in np.argwhere(share >= 0.0005):
            ink = "white" if share[row, column] > 0.6 else "black"
            text = f"{100 * share[row, column]:.1f}"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize="small")
    figure.colorbar(shown, label="% of the true class", shrink=0.8)
    save_figure(figure, png_path)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size, in inches."""
    from matplotlib.figure import Figure  # slow to import, and most commands plot only at the end

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: str) -> None:
    """Write a figure as PNG, atomically."""
    if os.path.splitext(path)[1].lower() != ".png":
        raise UserError(f"{path}: plots are written as PNG; choose a name that ends in .png")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=100)
    write_atomically(path, lambda file: file.write(encoded.getvalue()))
