"""File names: which are images, and what an image is called.

The name of an image is its path below the folder that was searched, with slashes, without the
ending of an image file, in Unicode's composed form (NFC): macOS may store it decomposed.
"""

import os
import re
import unicodedata

from guided_diffusion.runtime.text import visible

DICOM_EXTENSIONS = (".dcm", ".dicom", ".ima")
IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *DICOM_EXTENSIONS,
)
MASK_SUFFIXES = ("_mask", "_gt", "_seg", "_label")
# made by operating systems and storage devices: copies, thumbnails, deleted files
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information")
_WILDCARD = re.compile(r"[*?[]")


def ending(path: str) -> str:
    """The ending of an image file, with its dot; "" for others, such as the last part of a UID."""
    found = os.path.splitext(path)[1]
    return found if found.lower() in IMAGE_EXTENSIONS else ""


def stem(path: str) -> str:
    """The name of an image (see above), for a path below the folder that was searched."""
    return composed(path.removesuffix(ending(path)).replace(os.sep, "/"))


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which equal texts are equal."""
    return unicodedata.normalize("NFC", text)


def spellings(name: str) -> list[str]:
    """How a table may spell a name: bytes that are not UTF-8 as logs show them, or in the encodings
    of Windows."""
    found = [visible(name)]
    if found != [name]:
        content = os.fsencode(name)
        found += [composed(content.decode(c, "replace")) for c in ("cp1252", "cp850")]
    return found


def without_mask_suffix(name: str) -> str:
    """The name of the image that a mask of this name belongs to."""
    return next((name[: -len(end)] for end in MASK_SUFFIXES if name.lower().endswith(end)), name)


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or made by the operating system for itself."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def is_pattern(path: str) -> bool:
    """Whether a path holds a wildcard of a glob."""
    return bool(_WILDCARD.search(path))


def fixed_part(pattern: str) -> str:
    """The folder before the first wildcard of a glob, with its slash; "" for the current one."""
    wildcard = _WILDCARD.search(pattern)
    return pattern[: pattern.rfind("/", 0, wildcard.start() if wildcard else None) + 1]


def varying_part(path: str, pattern: str) -> str:
    """What distinguishes a file that a glob found from the others, a path with slashes.

    It is what the wildcards matched, and what lies below: data/*/IMG finds data/p1/IMG/a.png as
    p1/a.png. Thus images and masks pair by globs too.
    """
    base = len(fixed_part(pattern))
    parts = [part for part in path[base:].split("/") if part]
    wanted = [part for part in pattern[base:].split("/") if part]
    if "**" in wanted:  # it matches any number of folders
        start = wanted.index("**")
        fixed = {part for part in wanted[start:] if not is_pattern(part)}
        parts = [*parts[:start], *(p for p in parts[start:-1] if p not in fixed), parts[-1]]
        wanted = wanted[:start]
    wanted += ["*"] * (len(parts) - len(wanted))
    kept = [part for part, want in zip(parts[:-1], wanted) if is_pattern(want)]
    return "/".join([*kept, parts[-1]])
