"""Fuzz the image readers: every damaged file must yield an image or one clean error.

    python benchmarks/fuzz_readers.py [--files 2000] [--seed 0]

Takes a valid file of every format, flips bits in it or truncates it (a function of seed and file
number), and passes it to read_image and read_mask in a process of limited memory. Prints how many
files were read, were refused, crashed the process, hung, or were "unclean": raised anything but a
one-line ImageError that names the file. Exits with 1 if there were any of the last three.
"""

import argparse
import io
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter

import numpy as np
from PIL import Image
from pydicom import dcmwrite, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from guided_diffusion.images.image_io import ImageError, Intensity, read_image
from guided_diffusion.images.masks import read_mask

OUTCOMES = ("read", "refused", "unclean", "crashed", "hung")


def valid_files() -> dict[str, bytes]:
    """A small valid file of every format, by file name."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:40, 0:56]
    grey = ((rows * 3 + columns * 2) % 256).astype(np.uint8)
    grey16 = (rows * 900 + columns * 400).astype(np.uint16)
    mask = (rows // 8).astype(np.uint8)
    colour = np.stack([grey, grey.T.reshape(40, 56), rng.integers(0, 256, (40, 56))], -1)
    picture, rgb = Image.fromarray(grey), Image.fromarray(colour.astype(np.uint8))
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    rgba = Image.merge("RGBA", (*rgb.split(), picture))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "grey.png": _encode(picture, "PNG"),
        "grey16.png": _encode(Image.fromarray(grey16), "PNG"),
        "rgb.png": _encode(rgb, "PNG"),
        "rgba.png": _encode(rgba, "PNG"),
        "grey_alpha.png": _encode(rgba.convert("LA"), "PNG"),
        "palette.png": _encode(palette, "PNG"),
        "bilevel.png": _encode(picture.convert("1"), "PNG"),
        "grey.jpg": _encode(picture, "JPEG"),
        "rgb.jpg": _encode(rgb, "JPEG", exif=exif),
        "progressive.jpg": _encode(rgb, "JPEG", progressive=True),
        "cmyk.jpg": _encode(rgb.convert("CMYK"), "JPEG"),
        "grey.bmp": _encode(picture, "BMP"),
        "rgb.bmp": _encode(rgb, "BMP"),
        "palette.gif": _encode(palette, "GIF"),
        "grey.gif": _encode(picture, "GIF"),
        "lossy.webp": _encode(rgb, "WEBP"),
        "lossless.webp": _encode(rgba, "WEBP", lossless=True),
        "grey.tif": _encode(picture, "TIFF"),
        "grey16.tif": _encode(Image.fromarray(grey16), "TIFF"),
        "int32.tif": _encode(Image.fromarray(grey16.astype(np.int32)), "TIFF"),
        "float.tif": _encode(Image.fromarray(grey16.astype(np.float32) / 7e4), "TIFF"),
        "rgb_lzw.tif": _encode(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tif": _encode(picture, "TIFF", compression="tiff_deflate"),
        "jpeg.tif": _encode(rgb, "TIFF", compression="jpeg"),
        "bilevel.tif": _encode(picture.convert("1"), "TIFF", compression="group4"),
        "palette.tif": _encode(palette, "TIFF"),
        "cmyk.tif": _encode(rgb.convert("CMYK"), "TIFF"),
    }
    stored = grey16.astype("<u2").tobytes()
    compressed = {
        uid.JPEG2000Lossless: (_encode(Image.fromarray(grey16), "JPEG2000", no_jp2=True), 16),
        uid.JPEGBaseline8Bit: (files["grey.jpg"], 8),
        uid.JPEGLosslessSV1: (files["grey.jpg"], 8),
    }
    window = {
        "WindowCenter": 20000,
        "WindowWidth": 30000,
        "RescaleSlope": 2,
        "RescaleIntercept": -9,
    }
    files |= {
        "explicit.dcm": _dicom(stored, uid.ExplicitVRLittleEndian, **window),
        "implicit.dcm": _dicom(stored, uid.ImplicitVRLittleEndian, PixelRepresentation=1),
        "deflated.dcm": _dicom(stored, uid.DeflatedExplicitVRLittleEndian),
        "big_endian.dcm": _dicom(grey16.astype(">u2").tobytes(), uid.ExplicitVRBigEndian),
        "rgb.dcm": _dicom(np.asarray(rgb).tobytes(), uid.ExplicitVRLittleEndian, 8, samples=3),
        "voi_lut.dcm": _dicom(stored, uid.ExplicitVRLittleEndian, VOILUTSequence=[_lut_item()]),
        "modality_lut.dcm": _dicom(
            stored, uid.ExplicitVRLittleEndian, ModalityLUTSequence=[_lut_item()]
        ),
    }
    for syntax, (stream, bits) in compressed.items():
        files[f"{syntax.keyword}.dcm"] = _dicom(encapsulate([stream]), syntax, bits)
    files["headerless.dcm"] = files["explicit.dcm"][132 + _meta_length(files["explicit.dcm"]) :]
    return files


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip 1 to 64 bits (half the time within the first 600 bytes), truncate the file, or both."""
    damaged = bytearray(content)
    kind = rng.integers(4)
    if kind != 3:
        reach = min(len(damaged), 600) if rng.integers(2) else len(damaged)
        for place in rng.integers(0, reach, 2 ** rng.integers(0, 7)):
            damaged[place] ^= 1 << int(rng.integers(8))
    if kind >= 2:
        del damaged[int(rng.integers(len(damaged))) :]
    return bytes(damaged)


def damaged_file(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """Name and content of damaged file `number`; formats alternate."""
    name = list(files)[number % len(files)]
    return name, mutate(files[name], np.random.default_rng((seed, number)))


def try_reading(path: str) -> tuple[str, str]:
    """The outcome, "read", "refused" or "unclean", and a description of what was unclean."""
    outcome = "refused"
    rules = [Intensity("full"), Intensity("percentile"), Intensity("window")]
    for read in (lambda p: [read_image(p, None, rule) for rule in rules], read_mask):
        try:
            read(path)
            outcome = "read"
        except ImageError as error:
            if path not in str(error) or "\n" in str(error):
                return "unclean", f"message {str(error)!r}"
        except BaseException as error:  # any other exception is a finding
            return "unclean", f"{type(error).__name__}: {error}"
    return outcome, ""


def run_worker(first: int, last: int, seed: int, memory: int) -> None:
    """Read damaged files within `memory` bytes of address space; prints one JSON line per file."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    warnings.simplefilter("error")  # a warning that reaches the user counts as unclean too
    files = valid_files()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            name, content = damaged_file(files, seed, number)
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                file.write(content)
            outcome, detail = try_reading(path)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps([number, outcome, detail, peak]), flush=True)


def supervise(
    args: argparse.Namespace,
) -> tuple[list[tuple[int, str, str]], tuple[int, int], tuple[float, int]]:
    """Run workers over all files, restarting after each crash or hang.

    :return: number, outcome and detail of each file; peak memory in KiB and longest time in
        seconds, each with the number of its file.
    """
    results, peak, longest, number = [], (0, 0), (0.0, 0), 0
    while number < args.files:
        command = [sys.executable, __file__, "--worker", str(number)]
        for flag in ("files", "seed", "memory_mib"):
            command += [f"--{flag}", str(getattr(args, flag))]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        limit, unexpected, start = 60.0, b"", time.monotonic()  # the first answer includes start-up
        while number < args.files:
            ready, _, _ = select.select([worker.stdout], [], [], limit)
            line = worker.stdout.readline() if ready else b""
            if not line:
                worker.kill()
                outcome = "crashed" if ready else "hung"
                results.append((number, outcome, f"exit {worker.wait()} {unexpected[-300:]!r}"))
                number += 1
                break
            if not line.startswith(b"["):
                unexpected += line
                continue
            number, outcome, detail, memory = json.loads(line)
            if unexpected:
                outcome, detail = "unclean", f"printed {unexpected[-300:]!r}"
            results.append((number, outcome, detail))
            if limit == args.seconds:
                longest = max(longest, (time.monotonic() - start, number))
            peak = max(peak, (memory, number), key=lambda pair: pair[0])
            limit, unexpected, start, number = args.seconds, b"", time.monotonic(), number + 1
        worker.kill()
        worker.communicate()
    return results, peak, longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument(
        "--memory_mib", type=int, default=3072, help="address space of a worker, in MiB"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit per file")
    parser.add_argument("--keep", help="folder in which to keep the files that failed")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        run_worker(args.worker, args.files, args.seed, args.memory_mib * 2**20)
        return 0
    files = valid_files()
    results, peak, longest = supervise(args)
    counts = {name: Counter() for name in files}
    for number, outcome, detail in results:
        name, content = damaged_file(files, args.seed, number)
        counts[name][outcome] += 1
        if outcome not in ("read", "refused"):
            print(f"{outcome}: file {number}, {name}: {detail}")
            if args.keep:
                os.makedirs(args.keep, exist_ok=True)
                with open(os.path.join(args.keep, f"{number}_{name}"), "wb") as file:
                    file.write(content)
    print(f"{'format':32}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for name, count in counts.items():
        print(f"{name:32}" + "".join(f"{count[outcome]:9}" for outcome in OUTCOMES))
    total = sum(counts.values(), Counter())
    print(f"{'all ' + str(len(results)):32}" + "".join(f"{total[o]:9}" for o in OUTCOMES))
    print(
        f"peak resident memory {peak[0] / 1024:.0f} MiB (file {peak[1]}), "
        f"longest time {longest[0]:.2f} s (file {longest[1]})"
    )
    return int(any(total[outcome] for outcome in ("unclean", "crashed", "hung")))


def _encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _dicom(
    stored: bytes, syntax: uid.UID, bits: int = 16, samples: int = 1, **elements: object
) -> bytes:
    """A DICOM file of 40 x 56 pixels with this pixel data and these further elements."""
    dataset = Dataset()
    dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 40, 56, samples
    dataset.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME1"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    for key, value in elements.items():
        setattr(dataset, key, value)
    dataset.PixelData = stored
    dataset["PixelData"].VR = "OB" if syntax.is_encapsulated or bits == 8 else "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def _lut_item() -> Dataset:
    """A linear lookup table from 8 to 16 bits."""
    item = Dataset()
    item.LUTDescriptor = [256, 0, 16]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = list(range(0, 65536, 256))
    item["LUTData"].VR = "US"
    item.ModalityLUTType = "US"
    return item


def _meta_length(content: bytes) -> int:
    """Length in bytes of the file meta information that follows the preamble and DICM."""
    return 12 + int.from_bytes(content[140:144], "little")


if __name__ == "__main__":
    sys.exit(main())
