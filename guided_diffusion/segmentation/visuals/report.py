"""report.html: predictions to browse, in one file that loads nothing from elsewhere."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guided_diffusion.runtime.storage.files import write_atomically
from guided_diffusion.runtime.text import encode, visible
from guided_diffusion.segmentation.categories import Category, to_plain
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.visuals.embedded import (
    as_uint8,
    data_uri,
    fill,
    picture_uri,
    scaled,
    size_within,
)

# the longest side of a thumbnail in pixels, and the most cards in a file, of then about 10 MB
SIDE = 384
LIMIT = 400
_TEMPLATE = "report.html"


@dataclass(frozen=True)
class Card:
    """One radiograph in the report.

    urgency: where there are too many cards, those of the highest urgency are kept. plain: what the
    page's script reads.
    """

    urgency: float
    plain: dict[str, Any]


def make_card(
    name: str,
    image: np.ndarray | None,
    mask: np.ndarray,
    scores: Mapping[str, float],
    classes: Mapping[int, Sequence[float]],
    urgency: float = 0.0,
    true: np.ndarray | None = None,
    prediction: Prediction | None = None,
    download: tuple[str, bytes] | None = None,
    side: int = SIDE,
) -> Card:
    """Thumbnails and figures of one radiograph.

    :param image: as read, `[H x W]` or `[H x W x 3]`; None is shown black.
    :param mask: class indices `[H x W]`.
    :param scores: by name; the page sorts by them.
    :param classes: rows of figures, by class index.
    :param urgency: see `Card`.
    :param true: the true mask, class indices `[H x W]`.
    :param download: name and content of a PNG file to offer.
    :param side: the longest side of the thumbnails, in pixels.
    """
    height, width = mask.shape
    size = size_within(mask.shape, side)
    shown = np.zeros(mask.shape, np.uint8) if image is None else as_uint8(image)
    plain: dict[str, Any] = {
        "name": visible(name),
        "size": f"{width} × {height}",
        "width": size[0],
        "height": size[1],
        "image": picture_uri(scaled(shown, size), "JPEG", quality=80),
        "mask": picture_uri(_nearest(mask, size), "PNG", optimize=True),
        "scores": {label: _plain(value) for label, value in scores.items()},
        "classes": [[index, [_plain(v) for v in row]] for index, row in classes.items()],
    }
    if true is not None:
        plain["truth"] = picture_uri(_nearest(true, size), "PNG", optimize=True)
    if prediction is not None:
        grey = np.rint(prediction.uncertainty.clip(0, 1) * 255).astype(np.uint8)
        plain["uncertainty"] = picture_uri(scaled(grey, size), "JPEG", quality=75)
    if download:
        plain["download"] = {"name": download[0], "uri": data_uri("image/png", download[1])}
    return Card(urgency, plain)


@dataclass
class Report:
    """Cards, and the summary above them.

    orders: by what the page sorts, the first one initially: (a score's name or "name", whether the
    highest comes first). columns: titles of the figures of each class. limit: the most cards kept.
    """

    title: str
    categories: Sequence[Category]
    orders: Sequence[tuple[str, bool]]
    columns: Sequence[str] = ()
    limit: int = LIMIT
    _cards: list[tuple[float, int, Card]] = field(default_factory=list)
    _count: int = 0

    def add(self, card: Card) -> None:
        """Add a card; it is kept while it is among the most urgent."""
        entry = (card.urgency, -self._count, card)
        self._count += 1
        keep = heapq.heappush if len(self._cards) < self.limit else heapq.heappushpop
        keep(self._cards, entry)

    def html(
        self,
        facts: Sequence[tuple[str, Any]] = (),
        table: tuple[Sequence[str], Mapping[int, Sequence[float]]] | None = None,
        pictures: Mapping[str, str] | None = None,
    ) -> str:
        """The page as text.

        :param facts: labels and values for the whole set.
        :param table: titles of the columns, and rows of figures by class index.
        :param pictures: paths of PNG files, by caption.
        """
        cards = [card.plain for _, _, card in sorted(self._cards, key=lambda e: -e[1])]
        left_out = self._count > len(cards)
        disclaimer = "Not a medical device: research only."
        note = f"The {len(cards)} of {self._count} radiographs most in need of review."
        orders = [
            {"key": key, "falling": falls, "label": _order_label(key, falls)}
            for key, falls in self.orders
        ]
        plain: dict[str, Any] = {
            "title": self.title,
            "facts": [[label, _plain(value)] for label, value in facts],
            "categories": to_plain(self.categories),
            "columns": list(self.columns),
            "orders": orders,
            "table": None,
            "pictures": [
                {"caption": caption, "uri": data_uri("image/png", Path(path).read_bytes())}
                for caption, path in (pictures or {}).items()
            ],
            "cards": cards,
            "note": f"{note} {disclaimer}" if left_out else disclaimer,
        }
        if table:
            rows = [[index, [_plain(v) for v in row]] for index, row in table[1].items()]
            plain["table"] = {"columns": list(table[0]), "rows": rows}
        return fill(_TEMPLATE, plain)

    def write(self, path: str, *args: Any, **options: Any) -> None:
        """Write the page to a file, atomically.

        :param args: of `html`, as are `options`.
        """
        page = encode(self.html(*args, **options))
        write_atomically(path, lambda file: file.write(page))


def _order_label(key: str, falling: bool) -> str:
    return key if key == "name" else f"{key}, {'highest' if falling else 'lowest'} first"


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return round(float(value), 4) if math.isfinite(value) else None
    return value


def _nearest(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
