"""Damaged files through the readers: each must give a result or one clean error.

    python benchmarks/fuzz_readers.py [--files 2000] [--seed 0]

Writes a sound file of every format, then flips bits in it or cuts it short, always the same way for
the same seed and number, and hands it to read_image and read_mask in a process of limited memory.
Prints how many were read, how many refused, how many crashed the process, hung, or raised anything
but a one-line ImageError that names the file; ends with 1 if there is any of these.
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

from guided_diffusion.images.image_io import ImageError, Intensity, read_image, read_mask

OUTCOMES = ("read", "refused", "unclean", "crashed", "hung")


def sound_files() -> dict[str, bytes]:
    """A small sound file of every kind, by a name whose ending is the file's."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:40, 0:56]
    grey = ((rows * 3 + columns * 2) % 256).astype(np.uint8)
    deep = (rows * 900 + columns * 400).astype(np.uint16)
    mask = (rows // 8).astype(np.uint8)
    colour = np.stack([grey, grey.T.reshape(40, 56), rng.integers(0, 256, (40, 56))], -1)
    picture, rgb = Image.fromarray(grey), Image.fromarray(colour.astype(np.uint8))
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    rgba = Image.merge("RGBA", (*rgb.split(), picture))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "grey.png": _encoded(picture, "PNG"),
        "deep.png": _encoded(Image.fromarray(deep), "PNG"),
        "rgb.png": _encoded(rgb, "PNG"),
        "rgba.png": _encoded(rgba, "PNG"),
        "grey_alpha.png": _encoded(rgba.convert("LA"), "PNG"),
        "palette.png": _encoded(palette, "PNG"),
        "bits.png": _encoded(picture.convert("1"), "PNG"),
        "grey.jpg": _encoded(picture, "JPEG"),
        "rgb.jpg": _encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": _encoded(rgb, "JPEG", progressive=True),
        "cmyk.jpg": _encoded(rgb.convert("CMYK"), "JPEG"),
        "grey.bmp": _encoded(picture, "BMP"),
        "rgb.bmp": _encoded(rgb, "BMP"),
        "palette.gif": _encoded(palette, "GIF"),
        "grey.gif": _encoded(picture, "GIF"),
        "lossy.webp": _encoded(rgb, "WEBP"),
        "lossless.webp": _encoded(rgba, "WEBP", lossless=True),
        "grey.tif": _encoded(picture, "TIFF"),
        "deep.tif": _encoded(Image.fromarray(deep), "TIFF"),
        "whole.tif": _encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "float.tif": _encoded(Image.fromarray(deep.astype(np.float32) / 7e4), "TIFF"),
        "rgb_lzw.tif": _encoded(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tif": _encoded(picture, "TIFF", compression="tiff_deflate"),
        "jpeg.tif": _encoded(rgb, "TIFF", compression="jpeg"),
        "bits.tif": _encoded(picture.convert("1"), "TIFF", compression="group4"),
        "palette.tif": _encoded(palette, "TIFF"),
        "cmyk.tif": _encoded(rgb.convert("CMYK"), "TIFF"),
    }
    stored = deep.astype("<u2").tobytes()
    compressed = {
        uid.JPEG2000Lossless: (_encoded(Image.fromarray(deep), "JPEG2000", no_jp2=True), 16),
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
        "big.dcm": _dicom(deep.astype(">u2").tobytes(), uid.ExplicitVRBigEndian),
        "rgb.dcm": _dicom(np.asarray(rgb).tobytes(), uid.ExplicitVRLittleEndian, 8, samples=3),
        "table.dcm": _dicom(stored, uid.ExplicitVRLittleEndian, VOILUTSequence=[_table()]),
        "modality.dcm": _dicom(stored, uid.ExplicitVRLittleEndian, ModalityLUTSequence=[_table()]),
    }
    for syntax, (stream, bits) in compressed.items():
        files[f"{syntax.keyword}.dcm"] = _dicom(encapsulate([stream]), syntax, bits)
    files["headerless.dcm"] = files["explicit.dcm"][132 + _meta_length(files["explicit.dcm"]) :]
    return files


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip 1 to 64 bits, half of the time within the first 600 bytes, or cut the file, or both."""
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
    """Name and content of damaged file `number`; every format takes its turn."""
    name = list(files)[number % len(files)]
    return name, mutate(files[name], np.random.default_rng((seed, number)))


def judge(path: str) -> tuple[str, str]:
    """ "read", "refused" or "unclean", and what was said."""
    outcome = "refused"
    rules = [Intensity("full"), Intensity("percentile"), Intensity("window")]
    for read in (lambda p: [read_image(p, None, rule) for rule in rules], read_mask):
        try:
            read(path)
            outcome = "read"
        except ImageError as error:
            if path not in str(error) or "\n" in str(error):
                return "unclean", f"message {str(error)!r}"
        except BaseException as error:  # whatever it is, it is what we are looking for
            return "unclean", f"{type(error).__name__}: {error}"
    return outcome, ""


def work(first: int, last: int, seed: int, memory: int) -> None:
    """In the limited process: one line for each file."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    warnings.simplefilter("error")  # a warning that reaches the user is unclean, too
    files = sound_files()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            name, content = damaged_file(files, seed, number)
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                file.write(content)
            outcome, said = judge(path)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps([number, outcome, said, peak]), flush=True)


def supervise(
    args: argparse.Namespace,
) -> tuple[list[tuple[int, str, str]], tuple[int, int], tuple[float, int]]:
    """Outcome of each file; highest memory in KiB and longest time in seconds, with their files."""
    results, peak, longest, number = [], (0, 0), (0.0, 0), 0
    while number < args.files:
        command = [sys.executable, __file__, "--worker", str(number)]
        for flag in ("files", "seed", "memory_mib"):
            command += [f"--{flag}", str(getattr(args, flag))]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        limit, noise, start = 60.0, b"", time.monotonic()  # a first answer includes the start
        while number < args.files:
            ready, _, _ = select.select([worker.stdout], [], [], limit)
            line = worker.stdout.readline() if ready else b""
            if not line:
                worker.kill()
                outcome = "crashed" if ready else "hung"
                results.append((number, outcome, f"exit {worker.wait()} {noise[-300:]!r}"))
                number += 1
                break
            if not line.startswith(b"["):
                noise += line
                continue
            number, outcome, said, memory = json.loads(line)
            if noise:
                outcome, said = "unclean", f"printed {noise[-300:]!r}"
            results.append((number, outcome, said))
            if limit == args.seconds:
                longest = max(longest, (time.monotonic() - start, number))
            peak = max(peak, (memory, number), key=lambda pair: pair[0])
            limit, noise, start, number = args.seconds, b"", time.monotonic(), number + 1
        worker.kill()
        worker.communicate()
    return results, peak, longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="how many damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory_mib", type=int, default=3072, help="address space of the reader")
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit for one file")
    parser.add_argument("--keep", help="folder for the files that went wrong")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args.worker, args.files, args.seed, args.memory_mib * 2**20)
        return 0
    files = sound_files()
    results, peak, longest = supervise(args)
    counts = {name: Counter() for name in files}
    for number, outcome, said in results:
        name, content = damaged_file(files, args.seed, number)
        counts[name][outcome] += 1
        if outcome not in ("read", "refused"):
            print(f"{outcome}: number {number}, {name}: {said}")
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
        f"highest resident memory {peak[0] / 1024:.0f} MiB (number {peak[1]}), "
        f"longest file {longest[0]:.2f} s (number {longest[1]})"
    )
    return int(any(total[outcome] for outcome in ("unclean", "crashed", "hung")))


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _dicom(
    stored: bytes, syntax: uid.UID, bits: int = 16, samples: int = 1, **elements: object
) -> bytes:
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


def _table() -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [256, 0, 16]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = list(range(0, 65536, 256))
    item["LUTData"].VR = "US"
    item.ModalityLUTType = "US"
    return item


def _meta_length(content: bytes) -> int:
    """Bytes of the file meta group that follows the preamble and DICM."""
    return 12 + int.from_bytes(content[140:144], "little")


if __name__ == "__main__":
    sys.exit(main())
