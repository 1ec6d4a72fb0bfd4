"""What the page answers to an uploaded radiograph: its segmentation, and an editor of its mask."""

import html
import io
import os

from PIL import Image

from guided_diffusion.images.names import stem
from guided_diffusion.runtime.errors import UserError, as_user_error
from guided_diffusion.runtime.storage.files import remove_file
from guided_diffusion.segmentation.categories import ClassTable
from guided_diffusion.segmentation.inference.corrections import Corrections
from guided_diffusion.segmentation.inference.labelled_folder import MASKS
from guided_diffusion.segmentation.inference.predictor import Segmenter
from guided_diffusion.segmentation.inference.results import Item, Result
from guided_diffusion.segmentation.visuals.editor import can_edit, editor_page
from guided_diffusion.segmentation.visuals.report import Report

# longest side of the picture shown, in pixels; the mask to download has the radiograph's own size
SIDE = 1024


def page_for(predictor: Segmenter, path: str) -> str:
    """The HTML for one file, see `frame_of`.

    :raises ImageError: if the file cannot be read.
    """
    return frame_of(_segmented(predictor, path), predictor.categories)


def frame_of(result: Result, categories: ClassTable) -> str:
    """A report of one card, in a frame of its own."""
    encoded = io.BytesIO()
    Image.fromarray(result.mask).save(encoded, "PNG")
    download = (f"{result.item.name}_mask.png", encoded.getvalue())
    report = Report("Segmented radiograph", categories, [("name", False)], ["area %"])
    row = result.areas(categories)
    report.add(result.card(row, categories, download=download, side=SIDE))
    return _frame("Segmented radiograph", report.html())


def _segmented(predictor: Segmenter, path: str, name: str = "") -> Result:
    """:param name: of the file; by default that at `path`."""
    image = predictor.read(path)
    prediction = predictor.start([image])[0]()
    item = Item(path, stem(name or os.path.basename(path)))
    return Result(item, image, prediction.mask(), prediction)


def _frame(title: str, page: str) -> str:
    # sandboxed without the page's origin: it can only run its own script and save files
    return (
        f'<iframe title="{title}" sandbox="allow-scripts allow-downloads" '
        'style="width:100%;height:85vh;border:0" '
        f'srcdoc="{html.escape(page)}"></iframe>'
    )


def _alert(text: str) -> str:
    return f"<p role='alert'>{html.escape(text)}</p>"


class Visits:
    """What the page answers to an upload.

    :param corrections: takes corrected masks; None: the page has no editor.
    """

    def __init__(self, predictor: Segmenter, max_upload_mb: int, corrections: Corrections | None):
        self.predictor = predictor
        self.max_upload_mb = max_upload_mb
        self.corrections = corrections

    def segment(self, path: str | None, name: str, token: str) -> tuple[str, str]:
        """The HTML for an upload, and the key to what is kept of it.

        :param path: of the file, which is not there afterwards.
        :param name: that its owner gave it; "" if the browser did not tell.
        :param token: the key to the visitor's previous radiograph, which is forgotten.
        """
        self.forget(token)
        if not path:
            return "", ""
        try:
            if os.path.getsize(path) > self.max_upload_mb * 1e6:
                raise UserError(f"the file is larger than {self.max_upload_mb} MB")
            name = name or os.path.basename(path)
            result = _segmented(self.predictor, path, name)
            shown = frame_of(result, self.predictor.categories)
            if self.corrections is None:
                return shown, ""
            editor, token = self._editor(self.corrections, result, path, name)
            return editor + shown, token
        except Exception as error:
            known = as_user_error(error)
            if known is None:
                raise
            return _alert(str(known).replace(path, "the file")), ""
        finally:
            remove_file(path)

    def forget(self, token: str) -> None:
        if self.corrections is not None and token:
            self.corrections.forget(token)

    def _editor(
        self, corrections: Corrections, result: Result, path: str, name: str
    ) -> tuple[str, str]:
        """The editor, or why there is none, and the key to the radiograph, which is kept."""
        labelled, size = corrections.labelled, (result.mask.shape[0], result.mask.shape[1])
        try:
            if not can_edit(size):
                raise UserError(f"its {size[0]} x {size[1]} pixels are too many for an editor")
            place = labelled.place(name, path)
            labelled.check(place)
        except UserError as error:
            folder = os.path.join(labelled.path, "")
            said = str(error).replace(path, "the file").replace(folder, "")
            return _alert(f"This radiograph cannot be saved: {said}"), ""
        token = corrections.keep(path, name, size)
        note = f"{MASKS}/{place.mask} was saved before." if place.has_mask else "Not saved yet."
        page = editor_page(
            result.item.name, result.image, result.mask, labelled.categories.entries, token, note
        )
        return _frame("Correct the mask", page), token
