"""A local web page that segments an uploaded radiograph; nothing is kept."""

import contextlib
import html
import io
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

from PIL import Image

from guided_diffusion import dist_util
from guided_diffusion.images.names import stem
from guided_diffusion.runtime.errors import UserError, as_user_error
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.inference.config import ServeConfig
from guided_diffusion.segmentation.inference.local_only import LocalOnly
from guided_diffusion.segmentation.inference.predictor import Segmenter
from guided_diffusion.segmentation.inference.results import Item, Result
from guided_diffusion.segmentation.visuals.report import Report

# longest side of the picture shown, in pixels; the mask to download has the radiograph's own size
SIDE = 1024
# the visitor's own fonts: gradio would load its fonts from the internet
_FONTS = ("system-ui", "sans-serif")


def serve(config: ServeConfig, averaging: AveragingConfig, model: str) -> None:
    """The whole command: serve the page until Ctrl-C.

    :param model: a model file, or several separated by commas.
    """
    import_gradio()  # fails here, before the model is read
    predictor = averaging.on(dist_util.dev()).load(model, dist_util.dev())
    with served(predictor, model, config) as address:
        print(f"open {address} in a browser; Ctrl-C stops the server", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print("stopped")


def page_for(predictor: Segmenter, path: str) -> str:
    """The HTML for one file: a report of one card, in a frame of its own.

    :raises ImageError: if the file cannot be read.
    """
    image = predictor.read(path)
    prediction = predictor.start([image])[0]()
    mask = prediction.mask()
    name = stem(os.path.basename(path))
    encoded = io.BytesIO()
    Image.fromarray(mask).save(encoded, "PNG")
    download = (f"{name}_mask.png", encoded.getvalue())
    categories = predictor.categories
    result = Result(Item(path, name), image, mask, prediction)
    report = Report("Segmented radiograph", categories, [("name", False)], ["area %"])
    row = result.areas(categories)
    report.add(result.card(row, categories, download=download, side=SIDE))
    # sandboxed without the page's origin: it can only run its own script and save files
    return (
        '<iframe title="Segmented radiograph" sandbox="allow-scripts allow-downloads" '
        'style="width:100%;height:85vh;border:0" '
        f'srcdoc="{html.escape(report.html())}"></iframe>'
    )


def build_page(predictor: Segmenter, model: str, max_upload_mb: int = 64) -> Any:
    """The page, a `gradio.Blocks` that is not yet served."""
    gradio = import_gradio()

    def segment(path: str | None) -> str:
        if not path:
            return ""
        try:
            if os.path.getsize(path) > max_upload_mb * 1e6:
                raise UserError(f"the file is larger than {max_upload_mb} MB")
            return page_for(predictor, path)
        except Exception as error:
            known = as_user_error(error)
            if known is None:
                raise
            return f"<p role='alert'>{html.escape(str(known).replace(path, 'the file'))}</p>"
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    with gradio.Blocks(
        title="Segment a radiograph",
        analytics_enabled=False,
        delete_cache=(600, 600),  # seconds: uploads whose visitors left
    ) as page:
        gradio.Markdown(
            f"# Segment a radiograph\nModel: {os.path.basename(model)}. PNG, JPEG, TIFF or DICOM, "
            f"up to {max_upload_mb} MB. Files are deleted as soon as they are read. "
            "Not a medical device: research only."
        )
        upload = gradio.File(label="Radiograph", type="filepath", height=120)
        shown = gradio.HTML()
        upload.upload(segment, upload, shown)
        upload.clear(lambda: "", None, shown)
    return page


@contextlib.contextmanager
def served(predictor: Segmenter, model: str, config: ServeConfig) -> Iterator[str]:
    """Serve the page while the context is open; yields its address.

    :raises UserError: if the port is not available.
    """
    gradio = import_gradio()
    others = [name.strip() for name in config.allow_hosts.split(",") if name.strip()]

    @contextlib.asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = LocalOnly(app.middleware_stack, config.host, others)
        yield

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
                app_kwargs={"lifespan": guarded},
            )
        except OSError as error:
            raise UserError(
                f"port {config.port} of {config.host} is not available ({error}): give another"
                " --port"
            ) from error
        except ValueError as error:  # gradio's own first request to the page failed
            page.close(verbose=False)
            raise UserError(
                f"the page at {config.host}:{config.port} does not respond: the machine is busy, "
                "or a proxy intercepts local addresses (set NO_PROXY=127.0.0.1,localhost)"
            ) from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def import_gradio() -> ModuleType:
    """gradio, configured to send no requests to other machines."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"the page needs the package {error.name}: pip install '.[serve]' in the checkout"
        ) from error
    return gradio
