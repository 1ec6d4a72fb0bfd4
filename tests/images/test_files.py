import os

import numpy as np
import pytest
from images_util import GREY, MASK

from guided_diffusion.images import files
from guided_diffusion.images.files import list_images, pair_files
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.masks import read_mask, write_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import files as runtime_files

pytestmark = pytest.mark.filterwarnings("error")


class TestListing:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("b.png", "a.JPG", "sub/c.tif", "sub/deep/d.dcm", "notes.txt", ".hidden.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "e.png").touch()
        return tmp_path

    def names(self, paths, folder):
        return [os.path.relpath(path, folder) for path in paths]

    def test_folders_are_searched_recursively_and_sorted(self, folder):
        expected = ["a.JPG", "b.png", "sub/c.tif", "sub/deep/d.dcm"]
        assert self.names(list_images(str(folder)), folder) == expected

    def test_files_and_globs(self, folder):
        assert list_images(str(folder / "b.png")) == [str(folder / "b.png")]
        assert self.names(list_images(f"{folder}/*"), folder) == [
            *("a.JPG", "b.png"),
            *("sub/c.tif", "sub/deep/d.dcm"),
        ]
        assert self.names(list_images(f"{folder}/sub/*.tif"), folder) == ["sub/c.tif"]

    def test_no_images(self, tmp_path):
        for name in ("a.txt", "b.txt", "c.csv"):
            (tmp_path / name).touch()
        with pytest.raises(UserError) as caught:
            list_images(str(tmp_path))
        assert f"no images in {tmp_path};" in str(caught.value)
        assert "2 .txt, 1 .csv" in str(caught.value)
        assert ".tiff" in str(caught.value)
        with pytest.raises(UserError, match="does not exist"):
            list_images(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="it holds no files"):
            list_images(str(tmp_path / "*.png"))

    def test_dicom_without_an_extension(self, dicom, tmp_path):
        dicom(GREY, name="IM0001")
        dicom(GREY, name="1.2.840.7")
        dicom(GREY, name="DICOMDIR")
        (tmp_path / "README").write_text("words " * 100)
        assert self.names(list_images(str(tmp_path)), tmp_path) == ["1.2.840.7", "IM0001"]

    def test_circular_links_do_not_loop(self, folder):
        os.symlink(folder, folder / "sub" / "circle")
        assert len(list_images(str(folder))) == 4

    def test_linked_folders_are_followed(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("linked")
        os.symlink(folder, other / "data")
        assert len(list_images(str(other))) == 4

    def test_cloud_paths_go_through_blobfile(self, folder, save, monkeypatch):
        path = save("b.png", GREY)
        plain = list_images(str(folder))
        for module in (files, runtime_files):
            monkeypatch.setattr(module, "is_local", lambda path: False)
        assert sorted(list_images(str(folder))) == sorted(plain)
        assert np.array_equal(read_image(path), GREY)
        write_mask(str(folder / "m.png"), MASK)
        assert np.array_equal(read_mask(str(folder / "m.png")), MASK)


class TestPairing:
    @pytest.fixture
    def touch(self, tmp_path):
        def make(*names):
            for name in names:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).touch()
            return str(tmp_path / "img"), str(tmp_path / "mask")

        return make

    def test_stems_decide(self, touch, tmp_path):
        folders = touch(
            *("img/a.jpg", "img/b.dcm", "img/c.x.png", "img/d.png", "img/s/a.png", "img/e.tif"),
            *("mask/a.png", "mask/b_mask.tif", "mask/c.x_GT.png", "mask/d_seg.bmp"),
            *("mask/s/a_label.png", "mask/e.png"),
        )
        pairs = pair_files(*folders)
        assert [stem for stem, _, _ in pairs] == ["a", "b", "c.x", "d", "e", "s/a"]
        assert pairs[-1][1:] == (f"{tmp_path}/img/s/a.png", f"{tmp_path}/mask/s/a_label.png")
        assert pairs[1][2].endswith("b_mask.tif")
        assert pair_files(folders[0] + "/", folders[1] + "/")[2][0] == "c.x"

    def test_an_exact_name_is_taken_before_a_suffix(self, touch):
        folders = touch("img/a_gt.png", "img/a.png", "mask/a_gt.png", "mask/a.png")
        assert [(s, os.path.basename(m)) for s, _, m in pair_files(*folders)] == [
            ("a", "a.png"),
            ("a_gt", "a_gt.png"),
        ]

    def test_images_and_masks_side_by_side(self, touch):
        folder, _ = touch("img/a.png", "img/a_mask.png", "img/b.jpg", "img/b_seg.png")
        assert [s for s, _, _ in pair_files(folder, folder)] == ["a", "b"]
        touch("img/c.png")
        with pytest.raises(UserError, match=r"c\.png has no mask"):
            pair_files(folder, folder)

    def test_everything_that_does_not_pair_is_listed(self, touch):
        folders = touch(
            *("img/a.png", "img/b.png", "img/c.png", "img/c.jpg", "img/d.png"),
            *("mask/b.png", "mask/b_mask.png", "mask/c.png", "mask/x.png", "mask/d.png"),
        )
        with pytest.raises(UserError) as caught:
            pair_files(*folders)
        message = str(caught.value)
        assert message.startswith("4 names in")
        assert "img/a.png has no mask" in message
        assert "mask/x.png has no image" in message
        assert "mask/b.png and" in message
        assert "mask/b_mask.png all have the stem b" in message
        assert "img/c.jpg and" in message
        assert "d.png" not in message
        assert "\n" not in message

    def test_long_lists_end_with_a_count(self, touch):
        folders = touch("mask/x.png", *(f"img/{i:02}.png" for i in range(40)))
        with pytest.raises(UserError, match=r"^41 names .*09\.png has no mask; and 31 more"):
            pair_files(*folders)
