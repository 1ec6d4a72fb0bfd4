"""The page: a file goes in, classes and a mask come out, and nothing stays or leaves."""

import contextlib
import http.client
import io
import os
import socket
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser_util import chromium, watch
from PIL import Image
from serve_util import Halves, free_port, write

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.lock_file import RunLock
from guided_diffusion.segmentation.inference.config import ServeConfig
from guided_diffusion.segmentation.inference.local_only import LocalOnly
from guided_diffusion.segmentation.inference.serve import served
from guided_diffusion.segmentation.inference.visits import page_for


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio")
    config = ServeConfig(port=free_port(), max_upload_mb=1)
    with served(Halves(), "/models/segm.pth", config) as where:
        assert where.startswith("http://127.0.0.1:")
        yield where


def test_a_folder_has_one_server(tmp_path):
    pytest.importorskip("gradio")
    lock = RunLock(str(tmp_path / "run.lock"))
    lock.acquire()
    config = ServeConfig(port=free_port(), save_dir=str(tmp_path))
    said = "is in use by process .* name another --save_dir"
    with pytest.raises(UserError, match=said), served(Halves(), "segm.pth", config):
        pass
    lock.release()
    with served(Halves(), "segm.pth", config):
        assert os.listdir(tmp_path) == ["run.lock"]
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def test_a_radiograph_is_segmented_and_nothing_is_kept(address, browser, tmp_path):
    page = browser.new_page()
    page.set_default_timeout(120_000)  # a busy machine
    errors, asked = watch(page)
    page.goto(address)
    page.locator("input[type=file]").set_input_files(write(tmp_path / "chest.png"))
    frame = page.frame_locator("iframe[title='Segmented radiograph']")
    frame.locator("canvas[data-drawn=mask]").wait_for()
    assert "50" in frame.locator("tr[data-class='1'] td").text_content()
    assert "uncertainty" in frame.locator(".scores").text_content()
    with page.expect_download() as started:
        frame.get_by_text("Download chest_mask.png").click()
    mask = np.asarray(Image.open(io.BytesIO(started.value.path().read_bytes())))
    assert mask.shape == (30, 40)
    assert mask[:, :20].min() == 1
    assert mask[:, 20:].max() == 0
    folder = os.environ["GRADIO_TEMP_DIR"]
    kept = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    assert not any(os.path.getsize(path) for path in kept)  # gradio leaves empty files meanwhile
    local = (address, "data:", "blob:", "about:", address.replace("http", "ws"))
    assert [url for url in asked if not url.startswith(local)] == []
    assert errors == []
    assert page.locator("iframe").count() == 1  # no editor, as nothing would be saved
    assert "save_mask" not in page.content()
    page.close()


def test_what_is_no_radiograph_is_said(address, browser, tmp_path):
    page = browser.new_page()
    page.set_default_timeout(120_000)  # a busy machine
    page.goto(address)
    (tmp_path / "a.png").write_text("no picture")
    page.locator("input[type=file]").set_input_files(tmp_path / "a.png")
    alert = page.locator("p[role=alert]")
    alert.wait_for()
    assert "the file" in alert.text_content()
    assert os.environ["GRADIO_TEMP_DIR"] not in alert.text_content()
    page.close()


def test_large_files_are_refused(address, tmp_path):
    requests = pytest.importorskip("httpx")
    content = {"files": ("big.png", b"\0" * 1_200_000)}
    answer = requests.post(f"{address}gradio_api/upload", files=content)
    assert answer.status_code == 413


def status(address, method="GET", path="/", **headers):
    """The status of a request with exactly these headers."""
    port = urlsplit(address).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value.format(port))
    connection.endheaders()
    return connection.getresponse().status


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
UPGRADE["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="


def test_only_its_own_names_and_pages_are_answered(address):
    for host in ("localhost:{}", "127.0.0.1:{}", "[::1]:{}", "LOCALHOST:{}", "localhost"):
        assert status(address, Host=host) == 200
    own = {"Host": "localhost:{}", "Origin": "http://localhost:{}"}
    assert status(address, **own) == 200
    assert status(address, "POST", "/gradio_api/upload", **own) not in (403, 404)
    for foreign in (
        {"Host": "evil.example:{}"},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example:{}"},
        {"Host": "localhost@evil.example:{}"},
        {"Host": "192.168.0.9:{}"},
        {"Host": ""},
        {"Host": "localhost:x"},
        {"Host": "evil.example:{}", "Origin": "http://evil.example:{}"},
        {"Host": "localhost:{}", "Origin": "http://evil.example"},
        {"Host": "localhost:{}", "Origin": "http://localhost:1"},
        {"Host": "localhost:{}", "Origin": "null"},
    ):
        assert status(address, **foreign) == 403, foreign
        assert status(address, **foreign, **UPGRADE) == 403, foreign
        for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
            assert status(address, "POST", path, **foreign) == 403, foreign
            preflight = {"Access-Control-Request-Method": "POST"}
            assert status(address, "OPTIONS", path, **foreign, **preflight) == 403, foreign


@pytest.mark.parametrize(
    ("listens_on", "more", "allowed", "refused"),
    [
        ("0.0.0.0", (), ["192.168.0.9:7860", "[fe80::1]", socket.gethostname()], ["evil.example"]),
        ("::", (), ["[fe80::1]:7860", "localhost"], ["evil.example:7860"]),
        ("10.0.0.5", (), ["10.0.0.5:80", "localhost"], ["10.0.0.6", "evil.example"]),
        ("Box.lab", (), ["box.lab:7860", "127.0.0.1"], ["lab", "box.lab.evil.example"]),
        ("127.0.0.1", ["Box.lab"], ["box.lab", "localhost"], ["0.0.0.0", "10.0.0.5"]),
    ],
)
def test_names_by_the_address_listened_on(listens_on, more, allowed, refused):
    async def app(scope, receive, send):
        passed.append(scope)

    async def send(message):
        pass

    for host in (*allowed, *refused):
        passed = []
        scope = {"type": "http", "headers": [(b"host", host.encode())]}
        with contextlib.suppress(StopIteration):  # the browser's event loop runs already
            LocalOnly(app, listens_on, more)(scope, None, send).send(None)
        assert bool(passed) == (host in allowed), host


def test_corrections_need_a_folder(address):
    own = {"Host": "localhost:{}", "Content-Length": "0"}
    assert status(address, "POST", "/save_mask/x", **own) in (404, 405)


def test_names_are_only_names(tmp_path):
    page = page_for(Halves(), str(write(tmp_path / "a<b>&'.png")))
    assert page.count("<iframe") == 1
    assert "<b>" not in page
    assert page.count('"') == 8  # of the frame's attributes: nothing ends them early


def test_a_port_in_use_and_a_missing_package_are_one_line(script, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = ServeConfig(port=other.getsockname()[1])
        with (
            pytest.raises(UserError, match="give another --port"),
            served(Halves(), "segm.pth", config),
        ):
            pass
    monkeypatch.setitem(sys.modules, "gradio", None)
    ended = script("serve.py", "segm.pth")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "pip install '.[serve]'" in ended.err


def test_a_folder_for_corrections_that_cannot_be_written(script, tmp_path):
    pytest.importorskip("gradio")
    (tmp_path / "file").write_text("")
    ended = script("serve.py", "no_model.pth", "--save_dir", "file/below")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "cannot write file/below: a file is in the way of a folder" in ended.err
