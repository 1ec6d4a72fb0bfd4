"""The page's editor in a browser: what is painted, and nothing else, is in the saved mask."""

import io
import os

import numpy as np
import pytest
from browser_util import chromium, watch
from PIL import Image
from serve_util import Halves, free_port, write

from guided_diffusion.images.masks import read_mask
from guided_diffusion.segmentation.inference.config import ServeConfig
from guided_diffusion.segmentation.inference.serve import served

SIZE = (30, 40)
# as it is on its owner's disk, with characters that gradio leaves out
NAME = "anna $1 müller #2.png"
EDITOR = "iframe[title='Correct the mask']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("labelled") / "out"


@pytest.fixture(scope="module")
def address(folder):
    pytest.importorskip("gradio")
    config = ServeConfig(port=free_port(), save_dir=str(folder))
    with served(Halves(3), "/models/segm.pth", config) as where:
        yield where


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(address, browser):
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.set_default_timeout(60_000)  # a busy machine
    opened.goto(address)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def radiograph(tmp_path_factory):
    return write(tmp_path_factory.mktemp("own") / "r.png", SIZE).read_bytes()


class Editor:
    """Drops a radiograph into the page and paints on its mask."""

    def __init__(self, page, content, name=NAME):
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        page.locator("input[type=file]").set_input_files(file)
        self.page, self.frame = page, page.frame_locator(EDITOR)
        self.frame.locator("canvas[data-ready]").wait_for()
        page.locator(EDITOR).scroll_into_view_if_needed()

    def click(self, name):
        self.frame.get_by_role("button", name=name).click()

    def choose(self, index, tool="Brush"):
        self.frame.locator(f"#classes button[data-index='{index}']").click()
        self.click(tool)

    def paint(self, *points, size=1):
        """A stroke through pixels (row, column)."""
        self.frame.locator("#diameter").fill(str(size))
        box = self.frame.locator("#mask").bounding_box()
        height, width = SIZE
        for k, (row, column) in enumerate(points):
            x = box["x"] + (column + 0.5) * box["width"] / width
            y = box["y"] + (row + 0.5) * box["height"] / height
            self.page.mouse.move(x, y)
            if k == 0:
                self.page.mouse.down()
        self.page.mouse.up()

    def save(self, says):
        self.click("Save")
        self.frame.get_by_text(says).wait_for()

    def download(self):
        with self.page.expect_download() as started:
            self.click("Download")
        assert started.value.suggested_filename == f"{NAME[:-4]}_mask.png"
        return np.array(Image.open(io.BytesIO(started.value.path().read_bytes())))


def near(first, last, size):
    """The pixels whose centres lie within half of `size` of a line between centres."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]].astype(float)
    line = np.subtract(last, first).astype(float)
    along = (rows - first[0]) * line[0] + (columns - first[1]) * line[1]
    along = np.clip(along / max(line @ line, 1), 0, 1)
    y, x = rows - first[0] - along * line[0], columns - first[1] - along * line[1]
    return y**2 + x**2 <= (size / 2) ** 2 + 1e-9


def predicted():
    mask = np.zeros(SIZE, np.uint8)
    mask[:, : SIZE[1] // 2] = 1
    return mask


def saved(folder):
    return read_mask(str(folder / "MASK" / NAME), 3)


def test_what_was_painted_is_saved_and_fine_tuned_on(
    page, address, radiograph, folder, script, pretrained
):
    errors, asked = watch(page)
    editor = Editor(page, radiograph)
    expected = predicted()
    editor.choose(2)
    editor.paint((8, 10), size=5)
    expected[near((8, 10), (8, 10), 5)] = 2
    editor.paint((20, 12), (24, 33), size=3)
    expected[near((20, 12), (24, 33), 3)] = 2
    editor.choose(1, "Eraser")  # takes class 1 away and leaves class 2
    editor.paint((8, 12), (8, 16), size=3)
    expected[near((8, 12), (8, 16), 3) & (expected == 1)] = 0
    editor.choose(1)
    editor.paint((29, 39))
    expected[29, 39] = 1
    editor.paint((2, 30), size=9)
    editor.click("Undo")
    editor.paint((0, 0), (0, 39))
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+y")
    expected[0] = 1
    assert "Not saved yet." in editor.frame.locator("#status").text_content()
    assert np.array_equal(editor.download(), expected)
    assert [path.name for path in folder.iterdir()] == ["run.lock"]
    editor.save(f"Saved IMG/{NAME} and MASK/{NAME}.")
    assert np.array_equal(saved(folder), expected)
    assert (folder / "IMG" / NAME).read_bytes() == radiograph
    assert not (saved(folder) == predicted()).all()
    uploads = os.environ["GRADIO_TEMP_DIR"]
    kept = [os.path.join(where, name) for where, _, names in os.walk(uploads) for name in names]
    assert not any(os.path.getsize(path) for path in kept)
    local = (address, "data:", "blob:", "about:", address.replace("http", "ws"))
    assert [url for url in asked if not url.startswith(local)] == []
    assert errors == []
    table = ("--categories", folder / "categories.json")
    ended = script(
        "finetune.py", pretrained, folder / "IMG", folder / "MASK", "--epochs", 1, *table
    )
    assert ended.code == 0, ended.err


def test_undo_takes_back_everything_and_redo_returns_it(page, radiograph):
    editor = Editor(page, radiograph)
    editor.choose(2)
    editor.paint((3, 3), (25, 35), size=7)
    editor.choose(0)  # the background erases every class
    editor.paint((15, 19), size=12)
    painted = editor.download()
    assert set(np.unique(painted)) == {0, 1, 2}
    for _ in range(2):
        editor.click("Undo")
    assert np.array_equal(editor.download(), predicted())
    assert editor.frame.locator("#undo").is_disabled()
    for _ in range(2):
        editor.click("Redo")
    assert np.array_equal(editor.download(), painted)
    assert editor.frame.locator("#redo").is_disabled()


def test_zoom_changes_what_is_seen_and_not_what_is_painted(page, radiograph):
    editor = Editor(page, radiograph)
    before = editor.frame.locator("#mask").bounding_box()["width"]
    for _ in range(4):
        editor.click("Zoom out")
    assert editor.frame.locator("#mask").bounding_box()["width"] < before / 2
    editor.choose(2)
    editor.paint((4, 30), (20, 25), size=3)
    for _ in range(8):
        editor.click("Zoom in")
    assert editor.frame.locator("#mask").bounding_box()["width"] > 1.5 * before
    editor.paint((15, 20), (16, 18), size=2)
    expected = predicted()
    expected[near((4, 30), (20, 25), 3)] = 2
    painted = editor.download()
    near_the_middle = np.s_[12:20, 14:24]
    assert set(np.unique(painted[near_the_middle])) == {0, 1, 2}
    painted[near_the_middle] = expected[near_the_middle]
    assert np.array_equal(painted, expected)
    editor.click("Fit")
    assert editor.frame.locator("#mask").bounding_box()["width"] == pytest.approx(before)


def test_leaving_with_changes_is_asked(page, radiograph):
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    editor = Editor(page, radiograph, "leaving.png")
    editor.choose(2)
    editor.paint((5, 5))
    editor.save("Saved IMG/leaving.png")
    editor.paint((7, 7))
    editor.frame.get_by_text("Changes are not saved yet.").wait_for()
    page.reload()
    assert asked == ["beforeunload"]
    Editor(page, radiograph, "leaving.png").frame.get_by_text("was saved before.").wait_for()
    page.reload()
    assert asked == ["beforeunload"]


def test_replacing_is_asked_and_other_radiographs_are_refused(page, radiograph, folder, tmp_path):
    folder.mkdir(exist_ok=True)
    editor = Editor(page, radiograph, "again.png")
    editor.save("Saved IMG/again.png")
    path = str(folder / "MASK/again.png")
    editor.choose(2)
    editor.paint((5, 5))
    editor.save("MASK/again.png was saved before: replace it?")
    editor.click("Keep the old mask")
    assert np.array_equal(read_mask(path, 3), predicted())
    editor.save("MASK/again.png was saved before: replace it?")
    editor.frame.locator("#replace").click()
    editor.frame.get_by_text("Saved IMG/again.png").wait_for()
    assert read_mask(path, 3)[5, 5] == 2
    page.get_by_role("button", name="Clear").or_(page.get_by_label("Remove")).first.click()
    other = {"name": "again.png", "mimeType": "image/png"}
    other["buffer"] = write(tmp_path / "other.png", SIZE, grey=7).read_bytes()
    page.locator("input[type=file]").set_input_files(other)
    alert = page.locator("p[role=alert]")
    alert.wait_for()
    assert "IMG/again.png is another radiograph of this name" in alert.text_content()
    assert page.locator(EDITOR).count() == 0


def test_a_refusal_is_said_in_the_page(page, radiograph, folder):
    editor = Editor(page, radiograph, "late.png")
    (folder / "IMG").mkdir(parents=True, exist_ok=True)
    (folder / "IMG/late.png").write_bytes(b"another, meanwhile")
    editor.save("Not saved: IMG/late.png is another radiograph of this name")
    assert "wrong" in editor.frame.locator("#status").get_attribute("class")
    (folder / "IMG/late.png").unlink()
    editor.save("Saved IMG/late.png and MASK/late.png.")
