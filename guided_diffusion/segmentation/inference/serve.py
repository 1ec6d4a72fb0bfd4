"""A local page: a radiograph in, its classes, areas, uncertainty and mask out; nothing is kept."""

import contextlib
import html
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.segmentation.inference.job import prediction_card
from guided_diffusion.segmentation.inference.predictor import Predictor
from guided_diffusion.segmentation.inference.results import Item, areas_row
from guided_diffusion.segmentation.visuals.report import Report

# longest side of what the page shows, in pixels; the mask to download has the radiograph's own size
SIDE = 1024
# fonts of the visitor's system: gradio's own would be fetched from the internet
_FONTS = ("system-ui", "sans-serif")


@dataclass(frozen=True)
class ServeConfig:
    """The page"""

    TITLE = "Server"

    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    port: int = flag(7860, "number of the port")
    max_upload_mb: int = flag(64, "largest file taken, in MB")


def page_for(predictor: Predictor, path: str) -> str:
    """What is shown of a file: a report of one card, in a frame of its own.

    :raises ImageError: if it cannot be read.
    """
    image = predictor.read(path)
    prediction = predictor.start([image])[0]()
    mask = prediction.mask()
    name = os.path.splitext(os.path.basename(path))[0]
    row = areas_row(Item(path, name), mask, prediction, predictor.categories)
    encoded = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(encoded, "PNG")
    download = (f"{name}_mask.png", encoded.getvalue())
    report = Report("Segmented radiograph", predictor.categories, [("name", False)], ["area %"])
    options = {"download": download, "side": SIDE}
    report.add(prediction_card(row, image, mask, prediction, predictor.categories, **options))
    # a frame without the page's origin: it can run its own script and save files, nothing else
    return (
        '<iframe title="Segmented radiograph" sandbox="allow-scripts allow-downloads" '
        'style="width:100%;height:85vh;border:0" '
        f'srcdoc="{html.escape(report.html())}"></iframe>'
    )


def build_page(predictor: Predictor, model: str, max_upload_mb: int = 64) -> Any:
    """The page, a `gradio.Blocks` that listens nowhere yet."""
    gradio = import_gradio()

    def segment(path: str | None) -> str:
        if not path:
            return ""
        try:
            if os.path.getsize(path) > max_upload_mb * 1e6:
                raise UserError(f"the file is larger than {max_upload_mb} MB")
            return page_for(predictor, path)
        except UserError as error:
            return f"<p role='alert'>{html.escape(str(error).replace(path, 'the file'))}</p>"
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    with gradio.Blocks(
        title="Segment a radiograph",
        analytics_enabled=False,
        delete_cache=(600, 600),  # seconds: uploads that nobody waited for
    ) as page:
        gradio.Markdown(
            f"# Segment a radiograph\nModel: {os.path.basename(model)}. PNG, JPEG, TIFF or DICOM, "
            f"up to {max_upload_mb} MB. Files are removed as soon as they are read. "
            "Not a medical device: research only."
        )
        upload = gradio.File(label="Radiograph", type="filepath", height=120)
        shown = gradio.HTML()
        upload.upload(segment, upload, shown)
        upload.clear(lambda: "", None, shown)
    return page


@contextlib.contextmanager
def served(predictor: Predictor, model: str, config: ServeConfig) -> Iterator[str]:
    """Serve the page while the context is open, and give its address.

    :raises UserError: if the port cannot be had.
    """
    gradio = import_gradio()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(predictor, model, config.max_upload_mb)
        try:
            _, address, _ = page.launch(
                server_name=config.host,
                server_port=config.port,
                max_file_size=f"{config.max_upload_mb}mb",
                theme=gradio.themes.Default(font=_FONTS, font_mono=("monospace",)),
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                ssr_mode=False,
            )
        except OSError as error:
            raise UserError(
                f"port {config.port} of {config.host} cannot be had ({error}): give another --port"
            ) from error
        except ValueError as error:  # what gradio says where its own first request fails
            page.close(verbose=False)
            raise UserError(
                f"the page does not answer at {config.host}:{config.port}: the machine is busy, "
                "or a proxy stands before local addresses (set NO_PROXY=127.0.0.1,localhost)"
            ) from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def import_gradio() -> ModuleType:
    """gradio, told to ask nobody for anything."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"the page needs the package {error.name}: pip install '.[serve]' in the checkout"
        ) from error
    return gradio
