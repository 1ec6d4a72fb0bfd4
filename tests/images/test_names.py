"""Names as people have them: UIDs, accents, bytes that are no UTF-8, masks among radiographs."""

import os
import unicodedata

import pytest
from images_util import GREY

from guided_diffusion.images.files import find_pairs, list_images, list_radiographs, pair_files
from guided_diffusion.images.left_out import left_out
from guided_diffusion.images.names import ending, spellings, stem, varying_part
from guided_diffusion.images.patients import films_of
from guided_diffusion.runtime.errors import UserError

UID = "1.2.840.9999.7"


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.fixture
def touch(tmp_path):
    def make(*names: str) -> str:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    return make


class TestStem:
    @pytest.mark.parametrize(
        ("path", "name", "end"),
        [
            ("a.png", "a", ".png"),
            ("A.JPG", "A", ".JPG"),
            ("sub.1/a.tar.tiff", "sub.1/a.tar", ".tiff"),
            (f"s/{UID}.1", f"s/{UID}.1", ""),
            (f"{UID}.1.png", f"{UID}.1", ".png"),
            (f"{UID}.dcm", UID, ".dcm"),
            ("IM0001", "IM0001", ""),
            ("v1.5", "v1.5", ""),
        ],
    )
    def test_only_the_ending_of_an_image_file_is_cut_off(self, path, name, end):
        assert (stem(path), ending(path)) == (name, end)

    def test_files_named_by_uid_pair_with_masks_named_after_them(self, dicom, tmp_path):
        for number in (1, 2):
            (tmp_path / "M").mkdir(exist_ok=True)
            (tmp_path / "I").mkdir(exist_ok=True)
            dicom(GREY, name=f"I/{UID}.{number}")
            (tmp_path / "M" / f"{UID}.{number}.png").touch()
        pairs = pair_files(f"{tmp_path}/I", f"{tmp_path}/M")
        assert [name for name, *_ in pairs] == [f"{UID}.1", f"{UID}.2"]

    def test_patients_are_told_by_whole_uids(self):
        names = [name for name, _ in films_of([f"d/{UID}.1", f"d/{UID}.2"])]
        assert names == [f"{UID}.1", f"{UID}.2"]

    def test_a_table_of_windows_names_files_from_windows(self):
        assert spellings("r\udcf6n") == [r"r\xf6n", "rön", "r÷n"]
        assert spellings("rön") == ["rön"]


class TestAccents:
    def test_composed_and_decomposed_names_pair(self, touch):
        folder = touch("I/müller.png", "I/sub é/a.png")
        touch("M/" + nfd("müller.png"), "M/" + nfd("sub é/a_mask.png"))
        assert [name for name, *_ in pair_files(f"{folder}/I", f"{folder}/M")] == [
            "müller",
            "sub é/a",
        ]

    def test_two_files_of_one_name_are_told_apart_in_the_message(self, touch):
        folder = touch("I/müller.png", "I/" + nfd("müller.png"), "M/müller.png")
        with pytest.raises(UserError, match=r"stem müller, .*composed.*decomposed.*NFC"):
            pair_files(f"{folder}/I", f"{folder}/M")


class TestMasksAmongRadiographs:
    def names(self, paths, folder):
        return [os.path.relpath(path, folder) for path in paths]

    @pytest.mark.parametrize(
        ("radiographs", "others"),
        [
            (["a.png", "b.png"], ["masks/a.png", "masks/b.png"]),
            (["a.png"], ["train_masks/a.png"]),
            (["IMG/a.png"], ["MASK/a.png"]),
            (["images/train/a.png"], ["labels/train/a.png"]),
            (["x/images/a.png", "y/b.png"], ["x/GT/a.png"]),
            (["a.png", "b.jpg"], ["a_mask.png", "b_SEG.tif"]),
            (["a.png", "s/b.png"], ["a-mask.png", "s/b_Segmentation.png"]),
            (["a.png"], ["out/MASK/a.png", "out/COLOR/a.png", "out/OVERLAY/a.png"]),
            (["a.png"], ["MASK/a.png", "OVERLAY/a.png", "UNCERTAINTY/a.png"]),
            (["no_masks/a.png", "unlabelled/b.png", "unmasked/c.png"], ["masks/a.png"]),
            (["CXR/a.png"], ["ManualMask/leftMask/a.png", "ManualMask/rightMask/a.png"]),
            (["imagesTr/a.png"], ["labelsTr/a.png"]),
            (["JPEGImages/a.jpg"], ["SegmentationClass/a.png", "SegmentationObject/a.png"]),
            (["a.png"], ["masks_png/a.png"]),
        ],
    )
    def test_they_are_left_out_and_the_user_is_told(self, touch, radiographs, others):
        folder = touch(*radiographs, *others)
        paths, note = list_radiographs(folder)
        assert self.names(paths, folder) == radiographs
        assert others[0].split("/")[0] in note
        assert str(len(others)) in note

    @pytest.mark.parametrize(
        "names",
        [
            ["masks/a.png", "masks/b.png"],
            ["a_mask.png", "b_mask.png"],
            ["p1/a.png", "p2/COLOR/a.png"],
            ["samples_000010.png"],
        ],
    )
    def test_without_radiographs_beside_them_they_stay(self, touch, names):
        folder = touch(*names)
        assert list_radiographs(folder) == ([f"{folder}/{name}" for name in names], "")

    def test_pictures_of_a_run_are_none_only_beside_its_log(self, touch):
        folder = touch("a.png", "run/samples_000010.png", "segm_logs/curves.png", "samples_1.png")
        assert len(list_radiographs(folder)[0]) == 4
        touch("run/progress.csv", "segm_logs/log.txt")
        assert self.names(list_radiographs(folder)[0], folder) == ["a.png", "samples_1.png"]

    def test_a_folder_of_results_alone_is_refused(self, touch):
        folder = touch("MASK/a.png", "OVERLAY/a.png")
        with pytest.raises(UserError, match="all of its images are masks or results"):
            list_radiographs(folder)

    def test_formats_that_are_not_read_are_told(self, touch):
        folder = touch("a.png", "b.jp2", "c.JP2", "d.nii.gz", "notes.txt")
        assert list_radiographs(folder)[1].endswith("not read: 2 .jp2, 1 .gz")

    def test_order_of_a_listing_is_kept(self):
        assert list(left_out(["b_mask.png", "a.png", "b.png", "a_gt.png"], "")) == [
            "b_mask.png",
            "a_gt.png",
        ]


class TestFoldersInFolders:
    def test_masks_inside_the_folder_of_radiographs(self, touch):
        folder = touch("a.png", "b.png", "annots/a.png", "annots/b.tif")
        assert [name for name, *_ in pair_files(folder, f"{folder}/annots/")] == ["a", "b"]

    def test_radiographs_inside_the_folder_of_masks(self, touch):
        folder = touch("a.png", "raw/a.jpg")
        ((_, image, mask),) = pair_files(f"{folder}/raw", folder)
        assert (image, mask) == (f"{folder}/raw/a.jpg", f"{folder}/a.png")

    def test_by_way_of_a_link(self, touch):
        folder = touch("a.png", "masks/a.png")
        os.symlink(f"{folder}/masks", f"{folder}/.hidden")
        assert len(pair_files(folder, f"{folder}/.hidden")) == 1

    def test_earlier_results_need_no_masks_but_a_stray_mask_is_told(self, touch):
        folder = touch("a.png", "masks/a.png", "out/MASK/a.png", "out/OVERLAY/a.png")
        assert len(pair_files(folder, f"{folder}/masks")) == 1
        touch("a_gt.png")
        _, (stray,) = find_pairs(folder, f"{folder}/masks")
        assert stray.path.endswith("a_gt.png")


class TestGlobs:
    @pytest.mark.parametrize(
        ("path", "pattern", "part"),
        [
            ("data/p1/IMG/a.png", "data/*/IMG", "p1/a.png"),
            ("data/p1/IMG/s/a.png", "data/*/IMG/", "p1/s/a.png"),
            ("data/p1/IMG/a.png", "data/*/IMG/*.png", "p1/a.png"),
            ("data/p1/q/IMG/a.png", "data/**/IMG", "p1/q/a.png"),
            ("a.png", "*.png", "a.png"),
            ("data/p1/x.png", "data/p?/x.png", "p1/x.png"),
            ("/d/a/b.png", "/d/**", "a/b.png"),
        ],
    )
    def test_what_wildcards_match_is_the_name(self, path, pattern, part):
        assert varying_part(path, pattern) == part

    def test_folders_pair_by_globs_at_any_depth(self, touch):
        folder = touch(*(f"{p}/{k}/a.png" for p in ("p1", "q/p2") for k in ("IMG", "MASK")))
        for pattern in ("*", "**"):
            pairs = pair_files(f"{folder}/{pattern}/IMG", f"{folder}/{pattern}/MASK")
            assert [name for name, *_ in pairs] == ["p1/a"] + ["q/p2/a"] * (pattern == "**")

    def test_each_file_is_listed_once(self, touch):
        folder = touch("a.png", "s/b.png", "s/t/c.png", "__MACOSX/._a.png", "__MACOSX/d.png")
        assert len(list_images(f"{folder}/**")) == 3
        assert len(list_images(f"{folder}/**/*.png")) == 3


class TestListing:
    def test_what_systems_leave_behind_is_no_image(self, touch):
        folder = touch("a.PNG", "._a.png", "__MACOSX/a.png", "@eaDir/a.jpg", "Thumbs.db", ".b.png")
        assert list_images(folder) == [f"{folder}/a.PNG"]

    def test_a_folder_linked_beside_itself_counts_once(self, touch):
        folder = touch("a/x.png")
        os.symlink(f"{folder}/a", f"{folder}/0")
        assert list_images(folder) == [f"{folder}/a/x.png"]

    def test_home_and_variables(self, touch, monkeypatch):
        folder = touch("a/x.png")
        monkeypatch.setenv("HOME", folder)
        monkeypatch.setenv("SET", "a")
        assert list_images("~/a") == list_images("$HOME/${SET}") == [f"{folder}/a/x.png"]
        assert len(list_images("~/*/x.png")) == 1

    def test_a_broken_link_is_named(self, touch):
        folder = touch("x")
        os.symlink(f"{folder}/gone.png", f"{folder}/link.png")
        with pytest.raises(UserError, match=r"link\.png is a link to .*gone\.png"):
            list_images(f"{folder}/link.png")

    def test_a_folder_that_cannot_be_searched_is_named(self, touch, monkeypatch):
        folder = touch("a.png", "closed/b.png")
        scandir = os.scandir

        def closed(path):
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", closed)
        with pytest.raises(UserError, match="closed cannot be searched: Permission denied"):
            list_images(folder)
