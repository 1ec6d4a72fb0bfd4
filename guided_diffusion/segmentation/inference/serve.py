"""A local web page that segments an uploaded radiograph, and takes corrections of its mask."""

import contextlib
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

from guided_diffusion import dist_util
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.storage.files import check_output
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.inference.config import ServeConfig
from guided_diffusion.segmentation.inference.corrections import Corrections, SaveRoute
from guided_diffusion.segmentation.inference.labelled_folder import LabelledFolder
from guided_diffusion.segmentation.inference.local_only import LocalOnly
from guided_diffusion.segmentation.inference.predictor import Segmenter
from guided_diffusion.segmentation.inference.visits import Visits
from guided_diffusion.segmentation.visuals.editor import relay

# the name that a file has for its owner: gradio leaves characters out
_WITH_NAME = "(file, name, token) => [file, file?.orig_name ?? '', token]"
# the visitor's own fonts: gradio would load its fonts from the internet
_FONTS = ("system-ui", "sans-serif")


def serve(config: ServeConfig, averaging: AveragingConfig, model: str) -> None:
    """The whole command: serve the page until Ctrl-C.

    :param model: a model file, or several separated by commas.
    """
    device = dist_util.open_device()
    import_gradio()  # fails here, before the model is read
    if config.save_dir:
        check_output(config.save_dir, folder=True)
    predictor = averaging.on(device).load(model, device)
    with served(predictor, model, config) as address:
        print(f"open {address} in a browser; Ctrl-C stops the server", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        say("stopped")


def build_page(
    predictor: Segmenter,
    model: str,
    max_upload_mb: int = 64,
    corrections: Corrections | None = None,
) -> Any:
    """The page, a `gradio.Blocks` that is not yet served.

    :param corrections: takes corrected masks; None: the page has no editor.
    """
    gradio = import_gradio()
    visits = Visits(predictor, max_upload_mb, corrections)
    kept = "Files are deleted as soon as they are read. "
    if corrections is not None:
        kept = (
            f"Save stores a radiograph and its mask in the folder `{corrections.labelled.name}`;"
            " other files are deleted when the next is uploaded, or when the server stops. "
        )
    with gradio.Blocks(
        title="Segment a radiograph",
        analytics_enabled=False,
        delete_cache=(600, 600),  # seconds: uploads whose visitors left
    ) as page:
        gradio.Markdown(
            f"# Segment a radiograph\nModel: {os.path.basename(model)}. PNG, JPEG, TIFF or DICOM, "
            f"up to {max_upload_mb} MB. {kept}Not a medical device: research only."
        )
        upload = gradio.File(label="Radiograph", type="filepath", height=120)
        name = gradio.Textbox(visible=False)
        token = gradio.State("")
        shown = gradio.HTML()
        upload.upload(visits.segment, [upload, name, token], [shown, token], js=_WITH_NAME)
        upload.clear(lambda token: visits.segment(None, "", token), token, [shown, token])
    return page


@contextlib.contextmanager
def served(predictor: Segmenter, model: str, config: ServeConfig) -> Iterator[str]:
    """Serve the page while the context is open; yields its address.

    :raises UserError: if the port is not available, corrections cannot be saved, or another
        server saves them in the same folder.
    """
    gradio = import_gradio()
    labelled = LabelledFolder(config.save_dir, predictor.categories) if config.save_dir else None
    others = [name.strip() for name in config.allow_hosts.split(",") if name.strip()]

    @contextlib.asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        answering = app.middleware_stack
        if corrections is not None:
            answering = SaveRoute(answering, corrections)
        app.middleware_stack = LocalOnly(answering, config.host, others)
        yield

    # gradio serves what lies in its folder
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as scratch,
        run_lock.released(),
    ):
        if labelled is not None:  # one server at a time knows which names are taken
            run_lock.hold_folder(labelled.path, "name another --save_dir")
        os.environ["GRADIO_TEMP_DIR"] = folder
        corrections = None if labelled is None else Corrections(labelled, scratch)
        page = build_page(predictor, model, config.max_upload_mb, corrections)
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
                head=None if corrections is None else relay(),
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
