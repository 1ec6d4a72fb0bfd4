"""What the server takes for a corrected mask, and what it keeps meanwhile."""

import asyncio
import json
import os
import zlib

import numpy as np
import pytest
from conftest import digests
from serve_util import Halves, write

from guided_diffusion.images.masks import read_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference import corrections as module
from guided_diffusion.segmentation.inference.corrections import Corrections, SaveRoute, unpack
from guided_diffusion.segmentation.inference.labelled_folder import LabelledFolder
from guided_diffusion.segmentation.inference.visits import Visits
from guided_diffusion.segmentation.visuals import editor

SIZE = (30, 40)
MASK = np.eye(*SIZE, dtype=np.uint8) * 2


@pytest.fixture
def corrections(tmp_path):
    (tmp_path / "scratch").mkdir()
    labelled = LabelledFolder(str(tmp_path / "out"), generic_categories(3))
    return Corrections(labelled, str(tmp_path / "scratch"))


@pytest.fixture
def token(corrections, tmp_path):
    return corrections.keep(str(write(tmp_path / "up.png", SIZE)), "a.png", SIZE)


async def passed_on(scope, receive, send):
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def ask(corrections):
    """(status, answer) of a request in parts."""

    def send_request(path, *parts, method="POST"):
        messages = [{"type": "http.request", "body": p, "more_body": True} for p in parts]
        messages.append({"type": "http.request", "body": b""})
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method}
        asyncio.run(SaveRoute(passed_on, corrections)(scope, receive, send))
        start, body = sent
        return start["status"], json.loads(body["body"])

    return send_request


def packed(mask):
    return zlib.compress(mask.tobytes())


def test_a_mask_is_saved_and_replaced_after_a_question(ask, token, tmp_path):
    content = packed(MASK)
    answer = {"saved": "IMG/a.png and MASK/a.png"}
    assert ask(f"/save_mask/{token}", content[:10], content[10:]) == (200, answer)
    assert np.array_equal(read_mask(str(tmp_path / "out/MASK/a.png"), 3), MASK)
    status, said = ask(f"/save_mask/{token}", packed(MASK // 2))
    assert (status, list(said)) == (409, ["question"])
    assert np.array_equal(read_mask(str(tmp_path / "out/MASK/a.png"), 3), MASK)
    assert ask(f"/save_mask/{token}/replace", packed(MASK // 2)) == (200, answer)
    assert np.array_equal(read_mask(str(tmp_path / "out/MASK/a.png"), 3), MASK // 2)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"no mask", 400),
        (packed(MASK)[:-3], 400),
        (packed(MASK) + b"x", 400),
        (packed(MASK[1:]), 400),
        (packed(np.zeros((31, 40), np.uint8)), 400),
        (packed(MASK.astype(np.int16)), 400),
        (packed(MASK + 1), 400),
        (zlib.compress(bytes(10**8)), 413),
        (bytes(10**5), 413),
    ],
)
def test_what_is_no_mask_of_it(ask, token, tmp_path, content, status):
    before = digests(tmp_path)
    code, answer = ask(f"/save_mask/{token}/replace", content)
    assert (code, list(answer)) == (status, ["error"])
    assert "\n" not in answer["error"]
    assert str(tmp_path) not in answer["error"]
    assert digests(tmp_path) == before


def test_no_more_is_unpacked_than_the_radiograph_has_pixels(monkeypatch):
    bomb = zlib.compress(bytes(10**7))
    asked = []

    class Unpacking:
        def __init__(self, inner):
            self.inner = inner

        def decompress(self, content, most):
            asked.append(most)
            return self.inner.decompress(content, most)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    make = zlib.decompressobj
    monkeypatch.setattr(module.zlib, "decompressobj", lambda: Unpacking(make()))
    with pytest.raises(UserError, match="30 x 40 pixels"):
        unpack(bomb, SIZE)
    assert asked == [1201]


def test_other_requests(ask, token):
    assert ask("/")[0] == 299
    assert ask(f"/save_mask/{token}/../x")[0] == 299
    assert ask(f"/save_mask/{token}", method="GET")[0] == 405
    status, answer = ask("/save_mask/guessed", packed(MASK))
    assert (status, "download the mask" in answer["error"]) == (404, True)


def test_incompressible_masks_arrive(tmp_path, corrections, ask):
    noise = np.random.default_rng(0).integers(0, 3, (300, 400), dtype=np.uint8)
    path = str(write(tmp_path / "up.png", noise.shape))
    token = corrections.keep(path, "noise.png", noise.shape)
    stored = zlib.compress(noise.tobytes(), 0)  # larger than the mask
    assert len(stored) > noise.size
    assert ask(f"/save_mask/{token}", stored)[0] == 200


class TestVisits:
    @pytest.fixture
    def visits(self, corrections):
        return Visits(Halves(3), 1, corrections)

    def kept(self, corrections):
        return os.listdir(corrections.scratch)

    def test_only_the_last_radiograph_of_a_visitor_is_kept(self, visits, corrections, tmp_path):
        html, first = visits.segment(str(write(tmp_path / "a.png")), "a.png", "")
        assert html.count("<iframe") == 2
        assert self.kept(corrections) == [first]
        _, second = visits.segment(str(write(tmp_path / "a.png")), "b.png", first)
        assert self.kept(corrections) == [second]
        assert visits.segment(None, "", second) == ("", "")
        assert self.kept(corrections) == []
        assert not (tmp_path / "a.png").exists()

    def test_no_more_than_a_number_of_them(self, visits, corrections, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "MOST_KEPT", 2)
        tokens = [visits.segment(str(write(tmp_path / "a.png")), f"{k}.png", "")[1] for k in "abc"]
        assert sorted(self.kept(corrections)) == sorted(tokens[1:])

    @pytest.mark.parametrize("name", ["../a.png", "a.txt", "taken.png"])
    def test_without_a_name_to_save_under_there_is_no_editor(
        self, visits, corrections, tmp_path, name
    ):
        corrections.labelled.save("taken.png", str(write(tmp_path / "b.png", grey=1)), MASK)
        html, token = visits.segment(str(write(tmp_path / "a.png")), name, "")
        assert (html.count("<iframe"), token) == (1, "")
        assert html.startswith("<p role='alert'>This radiograph cannot be saved: ")
        assert str(tmp_path) not in html
        assert self.kept(corrections) == []

    def test_too_many_pixels_for_an_editor(self, visits, tmp_path, monkeypatch):
        monkeypatch.setattr(editor, "MOST_PIXELS", 1199)
        html, token = visits.segment(str(write(tmp_path / "a.png")), "a.png", "")
        assert "30 x 40 pixels are too many for an editor" in html
        assert token == ""

    def test_names_are_only_names(self, visits, tmp_path):
        name = "a<b>&'</script>$&.png".replace("/", "∕")
        html, token = visits.segment(str(write(tmp_path / "a.png")), name, "")
        assert token
        assert "<b>" not in html
        assert html.count('"') == 16  # of the frames' attributes: nothing ends them early
