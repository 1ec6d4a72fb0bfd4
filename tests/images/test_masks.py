import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_util import COLOUR, DEEP, GREY, MASK
from PIL import Image

from guided_diffusion.images.image_io import ImageError
from guided_diffusion.images.masks import LOSSLESS_EXTENSIONS, read_mask, write_mask

pytestmark = pytest.mark.filterwarnings("error")


class TestMasks:
    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from(LOSSLESS_EXTENSIONS),
        st.tuples(st.integers(1, 60), st.integers(1, 60)),
        st.integers(2, 256),
        st.integers(0, 2**32),
    )
    def test_reading_after_writing_is_the_identity(self, tmp_path_factory, ending, size, n, seed):
        path = str(tmp_path_factory.mktemp("m") / f"a{ending}")
        mask = np.random.default_rng(seed).integers(0, n, size, dtype=np.uint8)
        write_mask(path, mask)
        assert np.array_equal(read_mask(path, n), mask)

    def test_palette_masks_are_their_indices(self, save):
        picture = Image.fromarray(MASK).convert("P")
        picture.putpalette(COLOUR.tobytes())
        for ending in ("png", "gif", "tif", "bmp"):
            assert np.array_equal(read_mask(save(f"a.{ending}", picture), 7), MASK)

    def test_a_gif_of_greys_is_a_grey_mask(self, save):
        assert np.array_equal(read_mask(save("a.gif", MASK), 7), MASK)
        assert np.array_equal(read_mask(save("b.gif", MASK + 3), 10), MASK + 3)

    def test_sixteen_bit_one_bit_and_repeated_masks(self, save, dicom):
        assert np.array_equal(read_mask(save("a.png", MASK.astype(np.uint16)), 7), MASK)
        assert np.array_equal(read_mask(save("a.tif", MASK.astype(np.int32)), 7), MASK)
        assert np.array_equal(read_mask(save("b.tif", MASK.astype(np.float32)), 7), MASK)
        bits = Image.fromarray((MASK > 3).astype(np.uint8) * 255).convert("1")
        assert np.array_equal(read_mask(save("b.png", bits), 2), MASK > 3)
        assert np.array_equal(read_mask(save("c.png", np.dstack([MASK] * 3)), 7), MASK)
        opaque = np.dstack([MASK, MASK, MASK, np.full_like(MASK, 255)])
        assert np.array_equal(read_mask(save("d.png", opaque), 7), MASK)
        rescaled = dicom(MASK, RescaleSlope=3, PhotometricInterpretation="MONOCHROME1")
        assert np.array_equal(read_mask(rescaled, 7), MASK)

    def test_colour_masks_are_refused(self, save):
        with pytest.raises(ImageError, match=r"a\.png is a colour mask.*tools/rgb2tif\.py"):
            read_mask(save("a.png", COLOUR))

    def test_transparent_masks_are_refused(self, save):
        with pytest.raises(ImageError, match="transparent"):
            read_mask(save("a.png", np.dstack([MASK] * 4)))

    def test_black_and_white_masks_are_refused_with_the_remedy(self, save):
        path = save("img_07.png", np.where(MASK > 3, 255, 0).astype(np.uint8))
        with pytest.raises(ImageError) as caught:
            read_mask(path, 7)
        assert str(caught.value) == (
            f"{path} holds the values {{0, 255}}; 7 classes allow 0 to 6. A black-and-white mask? "
            "Convert it with tools/prepare_data.py --action validate --fix-issues."
        )

    def test_values_out_of_range_are_listed(self, save):
        with pytest.raises(ImageError, match=r"\{0, 1, 2, 3, 4, 5, 6\}; 5 classes allow 0 to 4"):
            read_mask(save("a.png", MASK), 5)
        with pytest.raises(ImageError, match=r"holds the values .*13200, \.\.\.\}"):
            read_mask(save("b.png", DEEP), 7)
        with pytest.raises(ImageError, match="-1"):
            read_mask(save("c.tif", MASK.astype(np.int32) - 1), 7)
        with pytest.raises(ImageError, match="fractions"):
            read_mask(save("d.tif", MASK.astype(np.float32) / 2), 7)

    def test_jpeg_masks_only_with_values_in_range(self, save):
        flat = save("a.jpg", np.full((8, 8), 3, np.uint8))
        assert (read_mask(flat, 7) == 3).all()
        blurred = save("b.jpg", np.kron(MASK, np.full((3, 3), 30, np.uint8)))
        with pytest.raises(ImageError, match="JPEG alters values"):
            read_mask(blurred, 7)

    def test_without_a_number_of_classes_every_byte_is_allowed(self, save):
        assert np.array_equal(read_mask(save("a.png", GREY)), GREY)

    def test_masks_are_not_written_with_loss(self, tmp_path):
        with pytest.raises(ImageError, match=r"a\.jpg would not keep"):
            write_mask(str(tmp_path / "a.jpg"), MASK)
