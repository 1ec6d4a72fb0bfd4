"""Truncated files are found by what stands at their end."""

import os

import numpy as np
import pytest
from images_util import GREY, save_picture, write_dicom

from guided_diffusion.images import image_io
from guided_diffusion.images.image_io import ImageError, check_image, check_images, read_image

LARGE = np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)
FORMATS = ("png", "jpg", "gif", "bmp", "webp", "tif", "dcm")


@pytest.fixture
def whole(tmp_path):
    def make(form: str) -> str:
        if form == "dcm":
            return write_dicom(tmp_path, LARGE.astype(np.uint16), name="a.dcm")
        return save_picture(tmp_path, f"a.{form}", LARGE)

    return make


@pytest.mark.parametrize("form", FORMATS)
def test_every_cut_is_found(whole, tmp_path, form):
    with open(whole(form), "rb") as file:
        content = file.read()
    for share in (0, 0.01, 0.5, 0.97):
        path = tmp_path / f"cut.{form}"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageError, match=r"cut\."):
            check_image(str(path))


@pytest.mark.parametrize("form", FORMATS)
def test_whole_files_are_not_decoded(whole, monkeypatch, form):
    path = whole(form)
    monkeypatch.setattr(image_io, "read_image", lambda path: pytest.fail("decoded"))
    check_images([path] * 3)


@pytest.mark.parametrize("form", FORMATS)
def test_what_stands_behind_an_image_is_no_fault(whole, form):
    path = whole(form)
    with open(path, "ab") as file:
        file.write(b"\0more")
    check_image(path)
    assert read_image(path).shape[:2] == LARGE.shape


def test_a_broken_link_is_named(tmp_path):
    os.symlink("gone.png", tmp_path / "link.png")
    with pytest.raises(ImageError, match=r"link\.png does not exist: it is a link to gone\.png"):
        check_images([save_picture(tmp_path, "a.png", GREY), str(tmp_path / "link.png")])


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png cannot be read: the file is empty"):
        check_image(str(tmp_path / "pipe.png"))
