"""The picture of README is drawn from the tables of docs/label-efficiency.md."""

import sys

from paths import ROOT

sys.path.insert(0, str(ROOT / "tools" / "documentation"))
import label_curves

TABLE = """
## Some films

| mean Dice of the foreground by method | k = 1 | k = 5 |
| --- | --- | --- |
| alone (`recipe`), in bold | **0.700 ± 0.100** | 0.8 |
| from scratch (`scratch`), not with five | 0.600 ± 0.050 | |
| `recipe` less `scratch` | +0.100 ± 0.010 | +0.010 ± 0.002 |
| of no method drawn (`plain`) | 0.1 | 0.2 |

| another table | k = 1 |
| --- | --- |
| (`recipe`) | 0.5 |
"""


def test_a_table_is_read():
    panels = label_curves.read_tables(TABLE)
    assert panels == {
        "Some films": {
            "recipe": ({1: 0.7, 5: 0.8}, {1: 0.1, 5: 0.0}),
            "scratch": ({1: 0.6}, {1: 0.05}),
        }
    }


def test_the_page_has_both_populations():
    panels = label_curves.read_tables(label_curves.PAGE.read_text(encoding="utf-8"))
    assert len(panels) == 2
    for curves in panels.values():
        for method in ("partner", "recipe", "imagenet"):
            assert list(curves[method].means) == [1, 2, 5, 10]


def test_it_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(label_curves, "PICTURE", tmp_path / "curves.png")
    assert label_curves.main() == 0
    assert (tmp_path / "curves.png").stat().st_size
