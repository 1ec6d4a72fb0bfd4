"""Corrected masks: radiographs that wait for theirs, and the address to which the page sends it."""

import asyncio
import json
import os
import re
import secrets
import shutil
import threading
import zlib
from dataclasses import dataclass

import numpy as np

from guided_diffusion.images.masks import list_values
from guided_diffusion.runtime.errors import UserError, as_user_error
from guided_diffusion.segmentation.inference.labelled_folder import AlreadySaved, LabelledFolder
from guided_diffusion.segmentation.inference.local_only import App, Message, Receive, Send

# radiographs whose corrections may still come; those beyond are forgotten, the oldest first
MOST_KEPT = 100
_PATH = re.compile(r"/save_mask/([\w-]{1,64})(/replace)?")
# what compression may add to data that it cannot compress, see zlib's compressBound
_OVERHEAD = 1 / 1000
_HEADER = 1024


class TooLarge(UserError):
    """More bytes than the radiograph has pixels."""


class Forgotten(UserError):
    """A radiograph that is not kept (any more)."""


@dataclass(frozen=True)
class Upload:
    """A radiograph that is being corrected: its content, its owner's name for it, its size."""

    path: str
    name: str
    height_width: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.height_width[0] * self.height_width[1]


class Corrections:
    """Keeps uploaded radiographs until their masks are corrected, and saves both.

    :param labelled: where to save them.
    :param scratch: a folder for the radiographs meanwhile, which nobody else reads.
    """

    def __init__(self, labelled: LabelledFolder, scratch: str):
        self.labelled = labelled
        self.scratch = scratch
        self._kept: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def keep(self, path: str, name: str, height_width: tuple[int, int]) -> str:
        """Move an uploaded file here; returns the key to it, which nobody can guess."""
        token = secrets.token_urlsafe(24)
        kept = os.path.join(self.scratch, token)
        shutil.move(path, kept)
        with self._lock:
            self._kept[token] = Upload(kept, name, height_width)
            oldest = list(self._kept)[:-MOST_KEPT]
        for other in oldest:
            self.forget(other)
        return token

    def forget(self, token: str) -> None:
        """Remove a radiograph, if it is kept."""
        with self._lock:
            upload = self._kept.pop(token, None)
            if upload is not None:
                os.remove(upload.path)

    def upload(self, token: str) -> Upload:
        """:raises Forgotten: if it is not kept."""
        try:
            return self._kept[token]
        except KeyError:
            raise Forgotten(
                "the server does not keep this radiograph any more: download the mask, and drop"
                " the radiograph in again"
            ) from None

    def save(self, token: str, content: bytes, replace: bool) -> str:
        """Save a corrected mask with its radiograph; returns where.

        :param content: see `unpack`.
        :raises UserError: if the content is no mask of it, and as `LabelledFolder.save` does.
        """
        upload = self.upload(token)
        mask = unpack(content, upload.height_width)
        allowed = [category.index for category in self.labelled.categories.entries]
        if not np.isin(mask, allowed).all():
            raise UserError(
                f"the mask holds the values {list_values(mask)}, which are not all classes: load"
                " the page again"
            )
        with self._lock:
            return str(self.labelled.save(upload.name, upload.path, mask, replace))


def unpack(content: bytes, height_width: tuple[int, int]) -> np.ndarray:
    """A mask uint8 `[H x W]`, sent as its bytes by rows, in zlib's format.

    :raises UserError: if it is anything else; never more than that is unpacked.
    """
    wanted = height_width[0] * height_width[1]
    unpacking = zlib.decompressobj()
    try:
        values = unpacking.decompress(content, wanted + 1)
    except zlib.error as error:
        raise UserError(f"the mask is damaged ({error}): save it again") from error
    if len(values) != wanted or not unpacking.eof or unpacking.unused_data:
        raise UserError(
            f"the mask has not the {height_width[0]} x {height_width[1]} pixels of its radiograph:"
            " load the page again"
        )
    return np.frombuffer(values, np.uint8).reshape(height_width)


class SaveRoute:
    """An ASGI application that takes corrected masks, and passes all other requests on.

    POST /save_mask/TOKEN[/replace] with a mask, see `unpack`. The answer is JSON: {"saved": where},
    {"question": line} if a mask would be replaced, or {"error": line}.
    """

    def __init__(self, app: App, corrections: Corrections):
        self.app = app
        self.corrections = corrections

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        found = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if not found:
            await self.app(scope, receive, send)
            return
        status, answer = 405, {"error": "masks are sent by POST"}
        if scope["method"] == "POST":
            status, answer = await self._answer(found[1], bool(found[2]), receive)
        body = json.dumps(answer).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(
        self, token: str, replace: bool, receive: Receive
    ) -> tuple[int, dict[str, str]]:
        try:
            pixels = self.corrections.upload(token).pixels
            content = await _body(receive, pixels + int(pixels * _OVERHEAD) + _HEADER)
            saved = await asyncio.to_thread(self.corrections.save, token, content, replace)
            return 200, {"saved": saved}
        except AlreadySaved as error:
            return 409, {"question": str(error)}
        except Exception as error:
            known = as_user_error(error)
            if known is None:
                raise
            folder = os.path.join(self.corrections.labelled.path, "")
            return _status(known), {"error": str(known).replace(folder, "")}


def _status(error: UserError) -> int:
    if isinstance(error, Forgotten):
        return 404
    return 413 if isinstance(error, TooLarge) else 400


async def _body(receive: Receive, most: int) -> bytes:
    """A request's content of at most so many bytes."""
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise UserError("the mask did not arrive: save it again")
        content += message.get("body", b"")
        if len(content) > most:
            raise TooLarge("the mask is larger than its radiograph: load the page again")
        if not message.get("more_body", False):
            return bytes(content)
