"""`make docs`: the site builds without a warning, and its pages ask no other server."""

import importlib.util
import logging
import re

import pytest
from paths import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

from mkdocs.commands.build import build
from mkdocs.config import load_config

# what makes a browser fetch something, in pages and in style sheets
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|embed)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'> ]+)"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon|prefetch))[^>]*"
    r"\bhref=[\"']?((?:https?:)?//[^\"'> ]+)"
    r"|(?:url\(|@import )[\"']?((?:https?:)?//[^\"') ]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, and the warnings of building it."""
    folder = tmp_path_factory.mktemp("site")
    warnings = []

    class Collect(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    return folder, warnings


@pytest.fixture(scope="module")
def hooks():
    path = ROOT / "tools" / "documentation" / "site_hooks.py"
    spec = importlib.util.spec_from_file_location("site_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_builds_without_a_warning(site):
    assert site[1] == []


def test_all_pages_are_on_it_and_in_its_navigation(site):
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    front = (site[0] / "index.html").read_text()
    for page in pages:
        assert (site[0] / page.with_suffix(".html")).is_file(), page
        assert f'href="{page.with_suffix(".html").as_posix()}"' in front, page
    for name in ("CHANGELOG", "CONTRIBUTING"):
        assert (site[0] / f"{name}.html").is_file()
    assert 'id="install"' in front


def test_signatures_and_docstrings_are_on_it(site):
    page = (site[0] / "api" / "diffusion.html").read_text()
    assert 'id="guided_diffusion.gaussian_diffusion.GaussianDiffusion.training_losses"' in page
    assert "The terms of the training loss, one number per image." in page
    assert "param " not in re.sub(r"<[^>]+>", "", page)


def test_nothing_is_fetched_from_elsewhere(site):
    files = [*site[0].rglob("*.html"), *site[0].rglob("*.css")]
    found = {target for file in files for target in FETCHED.findall(file.read_text()) if target}
    assert len(files) > 20
    assert found == set()
    assert FETCHED.findall('<script src="https://unpkg.com/x"></script>')
    assert FETCHED.findall('<link rel="stylesheet" href="https://fonts.googleapis.com/css">')
    assert FETCHED.findall("@font-face{src:url(https://x.org/a.woff2)}")
    assert not FETCHED.findall('<a href="https://arxiv.org">')


@pytest.mark.parametrize(
    ("source", "link", "there"),
    [
        ("README.md", "[a](docs/data.md#masks)", "[a](data.md#masks)"),
        ("README.md", "![a](docs/demo.png)", "![a](demo.png)"),
        ("README.md", "[a](CONTRIBUTING.md)", "[a](CONTRIBUTING.md)"),
        ("README.md", "[a](flags/unet.sh)", "[a](files/flags/unet.sh)"),
        ("README.md", "[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("docs/data.md", "[a](labelling.md)", "[a](labelling.md)"),
        ("docs/data.md", "[a](#masks)", "[a](#masks)"),
        ("docs/data.md", "[a](../README.md#install)", "[a](index.md#install)"),
        ("docs/data.md", "[a](../flags/unet.sh)", "[a](files/flags/unet.sh)"),
        ("docs/api/images.md", "[a](../data.md)", "[a](../data.md)"),
        ("docs/api/images.md", "[a](../../README.md)", "[a](../index.md)"),
    ],
)
def test_links_lead_to_the_sites_pages(hooks, source, link, there):
    assert hooks.relinked(link, source) == there


def test_pages_that_the_navigation_lacks_come_last(hooks, tmp_path):
    for name in ("a.md", "b.md", "c/index.md", "c/a.md", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# A\n")
    config = {"docs_dir": str(tmp_path), "nav": ["index.md", {"B": ["b.md", "c"]}]}
    assert hooks.on_config(config)["nav"] == [
        "index.md",
        {"B": ["b.md", "c/index.md", "c/a.md"]},
        {"More": ["a.md", "d.md"]},
    ]
