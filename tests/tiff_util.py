"""TIFF files of every kind, written by hand: Pillow writes few of them."""

import struct
import zlib
from pathlib import Path

import numpy as np

_FORMS = {3: "H", 4: "I", 16: "Q"}


def write_any_tiff(
    path,
    values,
    order="<",
    big=False,
    planar=1,
    tile=0,
    rows=0,
    photometric=None,
    sample_format=None,
    bits=0,
    compression=1,
    pages=1,
    more=(),
):
    """Write `values` [H x W] or [H x W x C].

    order: of the bytes. big: BigTIFF. planar: 2 for a plane a channel. tile: side of tiles. rows:
    of a strip. bits: of a sample, if not those of the array's type. compression: 1 for none, 8 for
    deflate. pages: how often the page is repeated. more: further tags (number, type, values).
    """
    height, width, samples = (*values.shape, 1)[:3]
    bits = bits or 8 * values.dtype.itemsize
    planes = [values[..., c] for c in range(samples)] if planar == 2 else [values]
    down, across = (tile, tile) if tile else (rows or height, width)
    blocks = []
    for plane in planes:
        for y in range(0, height, down):
            for x in range(0, width, across):
                block = plane[y : y + down, x : x + across]
                if tile:
                    space = [(0, tile - side) for side in block.shape[:2]]
                    block = np.pad(block, space + [(0, 0)] * (block.ndim - 2))
                packed = _pack(block, bits, order)
                blocks.append(zlib.compress(packed) if compression == 8 else packed)
    start, content = 16 if big else 8, b""
    offsets = []
    for block in blocks:
        offsets.append(start + len(content))
        content += block + b"\0" * (len(block) % 2)
    kind = sample_format or {"u": 1, "i": 2, "f": 3, "c": 6}[values.dtype.kind]
    word, counts = 16 if big else 4, [len(block) for block in blocks]
    tags = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * samples),
        (259, 3, [compression]),
        (262, 3, [(1 if samples < 3 else 2) if photometric is None else photometric]),
        (277, 3, [samples]),
        (284, 3, [planar]),
        (339, 3, [kind] * samples),
        *([(322, 4, [tile]), (323, 4, [tile])] if tile else [(278, 4, [down])]),
        *([(324, word, offsets), (325, word, counts)] if tile else []),
        *([(273, word, offsets), (279, word, counts)] if not tile else []),
        *more,
    ]
    first = start + len(content)
    head = (
        struct.pack(order + "HHHQ", 43, 8, 0, first)
        if big
        else struct.pack(order + "HI", 42, first)
    )
    content = (b"II" if order == "<" else b"MM") + head + content
    for page in range(pages):
        content += _directory(tags, len(content), order, big, last=page == pages - 1)
    Path(path).write_bytes(content)


def _pack(block, bits, order):
    if bits % 8:
        flat = block.reshape(len(block), -1, 1)
        return np.packbits((flat >> np.arange(bits)[::-1] & 1).reshape(len(block), -1), 1).tobytes()
    if bits == 24:
        wide = block.astype(f"{order}u4").view(np.uint8).reshape(*block.shape, 4)
        return wide[..., 1:].tobytes() if order == ">" else wide[..., :3].tobytes()
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def _directory(tags, start, order, big, last):
    count, form, entry, inline = ("Q", "Q", "HHQ", 8) if big else ("H", "I", "HHI", 4)
    size = struct.calcsize(order + count + form) + len(tags) * (
        inline + struct.calcsize("<" + entry)
    )
    entries, beyond = b"", b""
    for number, kind, values in sorted(tags):
        raw = struct.pack(f"{order}{len(values)}{_FORMS[kind]}", *values)
        if len(raw) > inline:
            beyond += raw + b"\0" * (len(raw) % 2)
            raw = struct.pack(order + form, start + size + len(beyond) - len(raw) - len(raw) % 2)
        entries += struct.pack(order + entry, number, kind, len(values)) + raw.ljust(inline, b"\0")
    following = 0 if last else start + size + len(beyond)
    return (
        struct.pack(order + count, len(tags))
        + entries
        + struct.pack(order + form, following)
        + beyond
    )
