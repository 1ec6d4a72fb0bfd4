"""The flags of writing masks as files of annotation tools, and the names of the formats."""

from dataclasses import dataclass

from guided_diffusion.runtime.command_line.flags import flag
from guided_diffusion.runtime.errors import UserError

# folder and format are called alike
FORMATS = ("coco", "labelme", "cvat", "dicomseg", "nifti", "nrrd")
_LISTED = ", ".join(FORMATS)
_TOLERANCE = 0.5


@dataclass(frozen=True)
class ExportConfig:
    """What prediction writes beside its other results."""

    TITLE = "Export"

    export: str = flag(
        "",
        f"also write EXPORT/FORMAT for annotation tools, of {_LISTED}; several with commas",
        metavar="FORMAT,...",
        basic=True,
    )
    tolerance: float = flag(
        _TOLERANCE,
        "of polygons: how far they may pass the corners of pixels, pixels; up to 0.5 they hold"
        " exactly the pixels of the mask, 0 follows the pixels' borders",
        least=0,
        most=100,
    )


@dataclass(frozen=True)
class ExportLabelsConfig:
    """What tools/export_labels.py writes."""

    TITLE = "Export"

    format: str = flag(
        "", f"what to write, of {_LISTED}; several with commas", metavar="FORMAT,...", basic=True
    )
    tolerance: float = flag(
        _TOLERANCE,
        "of polygons: how far they may pass the corners of pixels, pixels; up to 0.5 they hold"
        " exactly the pixels of the mask, 0 follows the pixels' borders",
        least=0,
        most=100,
        basic=True,
    )
    categories: str = flag(
        "", "class table; '': flags/categories.json if the masks fit it", basic=True
    )
    ignore_index: int = flag(
        -1,
        "value of mask pixels without a label, such as 255; -1: as the class table says",
        least=-1,
        most=2**16 - 1,
    )


def parse_formats(text: str, flag_name: str) -> tuple[str, ...]:
    """The formats that a flag names, each once; () for "".

    :raises UserError: if it names another, or with nothing but commas none.
    """
    names = [name.strip().lower() for name in text.split(",")] if text else []
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise UserError(f"{flag_name} {text}: {unknown[0]!r:.40} is none of {_LISTED}")
    return tuple(dict.fromkeys(names))
