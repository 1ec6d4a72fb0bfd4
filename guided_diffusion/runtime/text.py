"""Text that may hold names of files, whose bytes need not be UTF-8.

Python keeps a byte that is no UTF-8 as a lone surrogate, which no text file can hold. In text files
and on the screen such a byte is shown as `\\xNN`; JSON keeps it exactly, in Python's own escape.
"""

import codecs
import io
import sys

_HANDLER = "show_bytes"


def _show_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = ""
    for character in error.object[error.start : error.end]:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            shown += f"\\x{code - 0xDC00:02x}"
        else:
            shown += character.encode("ascii", "backslashreplace").decode()
    return shown, error.end


codecs.register_error(_HANDLER, _show_bytes)


def encode(text: str) -> bytes:
    """UTF-8, with `\\xNN` for each byte of a name that is not."""
    return text.encode("utf-8", _HANDLER)


def visible(text: str) -> str:
    """The text as `encode` shows it."""
    return encode(text).decode()


def one_line(text: object, most: int = 200) -> str:
    """What a library says, such as its error, on one line of at most so many characters."""
    return " ".join(str(text).split())[:most]


def print_any_name() -> None:
    """Let stdout and stderr show every name, whatever their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)
