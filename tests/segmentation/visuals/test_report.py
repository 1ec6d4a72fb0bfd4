"""report.html: what it holds, and what a browser makes of it."""

import json
import re

import numpy as np
import pytest
from browser_util import chromium, watch
from conftest import TINY, draw_pairs
from golden_util import fill_parameters

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.segmentation.categories import Category
from guided_diffusion.segmentation.inference.uncertainty import entropy_map
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.visuals.report import Report, make_card

TABLE = (
    Category(0, "background", (0, 0, 0)),
    Category(1, "left", (255, 0, 0)),
    Category(2, "right", (0, 0, 255)),
)
EVIL = "</script><script>window.evil = 1</script><!--"


def card(name, score, size=(40, 60), **options):
    """The predicted mask is 1 in the left third and 2 in the right; true has 2 in the middle."""
    predicted, true = np.zeros((2, *size), np.uint8)
    third = size[1] // 3
    predicted[:, :third], predicted[:, -third:] = 1, 2
    true[:, third:] = 2
    image = np.full(size, 100, np.uint8)
    probabilities = np.eye(3, dtype=np.float32)[predicted].transpose(2, 0, 1) * 0.7 + 0.1
    prediction = Prediction(probabilities, entropy_map(probabilities))
    rows = {1: [score, 12.3456], 2: [float("nan"), 1.0]}
    scores = {"mean Dice": score}
    return make_card(name, image, predicted, scores, rows, 1 - score, true, prediction, **options)


def report(scores, limit=400):
    found = Report(
        "Two & more", TABLE, [("mean Dice", False), ("name", False)], ["Dice", "HD"], limit
    )
    for name, score in scores.items():
        found.add(card(name, score))
    return found


def data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_most_doubtful_are_kept_in_their_order():
    page = report({f"r{n}": n / 10 for n in (3, 1, 9, 2, 8)}, limit=3).html()
    assert [c["name"] for c in data(page)["cards"]] == ["r3", "r1", "r2"]
    assert "The 3 of 5 radiographs most in need of review" in data(page)["note"]


def test_nothing_is_fetched_and_names_are_only_names():
    page = report({EVIL: 0.5}).html()
    assert page.count("<script") == 2
    assert data(page)["cards"][0]["name"] == EVIL
    assert not re.search(r"https?://|src=\"(?!data)|@import|url\(", page)


def test_thumbnails_are_small_and_never_enlarged():
    plain = card("a", 0.5, (1200, 600)).plain
    assert (plain["width"], plain["height"], plain["size"]) == (192, 384, "600 × 1200")
    assert len(json.dumps(plain)) < 12_000
    assert card("a", 0.5, (40, 60)).plain["width"] == 60
    assert card("a", 0.5, (1, 3000)).plain["height"] == 1
    assert data(report({"a": 0.5}).html())["cards"][0]["classes"][1] == [2, [None, 1.0]]


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, tmp_path):
    report({"b": 0.25, "a": 0.75, EVIL: 0.5}).write(
        str(tmp_path / "report.html"), [("radiographs", 3)], (["Dice"], {1: [0.5]})
    )
    opened = browser.new_page(color_scheme="dark")
    opened.errors, opened.asked = watch(opened)
    opened.goto(f"file://{tmp_path}/report.html")
    opened.wait_for_selector("canvas[data-drawn=mask]")
    yield opened
    assert opened.errors == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
    assert opened.evaluate("window.evil") is None
    opened.close()


def names(page):
    return page.locator("article h2 span").all_text_contents()


def ink(page, x, y=20):
    """(red, green, blue, opacity) of the first card's overlay."""
    script = "([c, x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]"
    canvas = page.locator("article canvas").first.element_handle()
    return page.evaluate(script, [canvas, x, y])


def test_cards_are_sorted_and_found(page):
    assert names(page) == ["b", EVIL, "a"]
    page.select_option("#sort", label="name")
    assert names(page)[1:] == ["a", "b"]
    page.fill("#find", "A")
    assert "a" in names(page)
    assert "b" not in names(page)
    page.fill("#find", "nothing such")
    assert page.locator("#none").is_visible()


def test_classes_are_switched(page):
    assert ink(page, 10)[:3] == [255, 0, 0]
    assert ink(page, 30)[3] == 0
    assert ink(page, 50)[:3] == [0, 0, 255]
    box = page.get_by_role("checkbox", name="left")
    box.focus()
    page.keyboard.press("Space")
    page.wait_for_selector('article tr.off[data-class="1"]')
    assert ink(page, 10)[3] == 0
    assert ink(page, 50)[:3] == [0, 0, 255]


def test_layers(page):
    page.get_by_text("true", exact=True).click()
    page.wait_for_selector("canvas[data-drawn=truth]")
    assert ink(page, 10)[3] == 0
    assert ink(page, 30)[:3] == [0, 0, 255]
    page.get_by_text("errors", exact=True).click()
    page.wait_for_selector("canvas[data-drawn=errors]")
    assert [ink(page, x)[3] > 0 for x in (10, 30, 50)] == [True, True, False]
    assert ink(page, 10) != ink(page, 30)  # added, missed
    assert page.locator("#errors").is_visible()
    page.get_by_text("uncertainty", exact=True).click()
    page.wait_for_selector("canvas[data-drawn=uncertainty]")
    assert ink(page, 30)[3] > 0


def test_the_slider_uncovers_the_radiograph_by_keyboard(page):
    slider = page.get_by_role("slider", name="b: how much shows the plain radiograph")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    style = "getComputedStyle(document.querySelector('article canvas')).clipPath"
    assert "3%" in page.evaluate(style)
    page.keyboard.press("End")
    assert "100%" in page.evaluate(style)
    page.locator("#wipe").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert {c.input_value() for c in page.locator("article .view input").all()} == {"1"}


def test_dark_and_light(page):
    shade = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(shade)
    page.get_by_role("button", name="Light").click()
    light = page.evaluate(shade)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150
    assert sum(map(int, re.findall(r"\d+", light))) > 600


def test_the_scripts_write_it(script, tmp_path, browser):
    settings = SegmentationConfig(TINY, ReadingConfig(16, 1), TABLE)
    weights = fill_parameters(settings.build()).state_dict()
    save_model(str(tmp_path / "segm.pth"), settings, weights)
    draw_pairs(tmp_path / "T", 3)
    assert script("predict.py", "segm.pth", "T/IMG", "out").code == 0
    argv = ("evaluate.py", "T/IMG", "T/MASK", "-m", "segm.pth", "-o", "ev")
    assert script(*argv).code == 0
    argv = ("evaluate.py", "out", "T/MASK", "--images", "T/IMG", "-o", "files", "--num_classes", 3)
    assert script(*argv).code == 0
    page = browser.new_page()
    errors, _ = watch(page)
    for folder, first in (("out", "uncertainty"), ("ev", "mean Dice"), ("files", "mean Dice")):
        page.goto(f"file://{tmp_path}/{folder}/report.html")
        page.wait_for_selector("canvas[data-drawn]")
        assert len(names(page)) == 3
        assert page.locator("#sort option").first.text_content().startswith(first)
        kept = data((tmp_path / folder / "report.html").read_text())["cards"]
        values = [c["scores"][first] for c in kept]
        shown = [values[[c["name"] for c in kept].index(name)] for name in names(page)]
        assert shown == sorted(values, reverse=first == "uncertainty")
    assert errors == []
    assert script("predict.py", "segm.pth", "T/IMG", "bare", "--report", "False").code == 0
    assert not (tmp_path / "bare/report.html").exists()
