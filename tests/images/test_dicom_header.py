"""DICOM files whose header lacks the transfer syntax, names a wrong one, or is not there."""

import zlib

import numpy as np
import pytest
from images_util import DEEP
from pydicom import Dataset, dcmread, uid
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info

from guided_diffusion.images.image_io import ImageError, check_image, pixel_spacing, read_image

pytestmark = pytest.mark.filterwarnings("error")

PREFIX = bytes(128) + b"DICM"
SYNTAXES = {
    "explicit": uid.ExplicitVRLittleEndian,
    "implicit": uid.ImplicitVRLittleEndian,
    "big endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
}


def body_of(path, syntax):
    """The data set of a file alone, encoded as `syntax` demands."""
    stream = DicomBytesIO()
    stream.is_little_endian = syntax != uid.ExplicitVRBigEndian
    stream.is_implicit_VR = syntax == uid.ImplicitVRLittleEndian
    dataset = Dataset(dcmread(path))
    if not stream.is_little_endian:
        dataset.PixelData = DEEP.astype(">u2").tobytes()
    write_dataset(stream, dataset)
    if syntax != uid.DeflatedExplicitVRLittleEndian:
        return stream.getvalue()
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(stream.getvalue()) + packer.flush()


def header(**elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    for key, value in elements.items():
        setattr(meta, key, value)
    stream = DicomBytesIO()
    write_file_meta_info(stream, meta, enforce_standard=False)
    return stream.getvalue()


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("prefix", [PREFIX, b""], ids=["DICM", "no prefix"])
@pytest.mark.parametrize("meta", ["lacking", "empty", "none"])
def test_the_data_tell_a_transfer_syntax_that_is_not_named(dicom, tmp_path, syntax, prefix, meta):
    if meta == "none" and not prefix and syntax == "deflated":
        pytest.skip("nothing at all to recognise it by")
    head = {"lacking": header(), "empty": header(TransferSyntaxUID=""), "none": b""}[meta]
    path = tmp_path / "a.dcm"
    source = dicom(DEEP, PixelSpacing=[0.2, 0.3])
    path.write_bytes(prefix + head + body_of(source, SYNTAXES[syntax]))
    check_image(str(path))
    np.testing.assert_allclose(read_image(str(path)), DEEP / 65535, rtol=1e-6)
    assert pixel_spacing(str(path)) == (0.2, 0.3)


@pytest.mark.parametrize("real", ["explicit", "implicit", "big endian"])
@pytest.mark.parametrize("named", SYNTAXES)
def test_a_native_transfer_syntax_that_contradicts_the_data(dicom, tmp_path, named, real):
    path = tmp_path / "a.dcm"
    body = body_of(dicom(DEEP), SYNTAXES[real])
    path.write_bytes(PREFIX + header(TransferSyntaxUID=SYNTAXES[named]) + body)
    np.testing.assert_allclose(read_image(str(path)), DEEP / 65535, rtol=1e-6)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("1.2.840.113619.5.2", "unknown or private"),
        ("1.2.3.4", "unknown or private"),
        (uid.MPEG4HP41, "compressed as MPEG"),
    ],
)
def test_transfer_syntaxes_that_cannot_be_decoded_are_named(dicom, tmp_path, named, said):
    path = tmp_path / "a.dcm"
    body = body_of(dicom(DEEP), uid.ExplicitVRLittleEndian)
    path.write_bytes(PREFIX + header(TransferSyntaxUID=named) + body)
    with pytest.raises(ImageError, match=said):
        read_image(str(path))


def test_compressed_pixels_without_a_transfer_syntax(dicom, tmp_path):
    path = tmp_path / "a.dcm"
    source = dcmread(dicom(DEEP, uid.JPEG2000Lossless, stream=b"\xff\x4f\xff\x51"))
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    write_dataset(stream, Dataset(source))
    path.write_bytes(PREFIX + header() + stream.getvalue())
    with pytest.raises(ImageError, match=r"a\.dcm .*its pixels are compressed.*export it again"):
        read_image(str(path))


@pytest.mark.parametrize("body", [b"", b"\0" * 400, b"words, words " * 40, bytes(range(256)) * 4])
def test_a_header_and_nothing_to_recognise(tmp_path, body):
    path = tmp_path / "a.dcm"
    path.write_bytes(PREFIX + header() + body)
    with pytest.raises(ImageError, match=r"a\.dcm cannot be read: its") as caught:
        read_image(str(path))
    assert "export it again" in str(caught.value)
