"""The flags of tools/pack_model.py."""

from dataclasses import dataclass

from guided_diffusion.runtime.command_line.flags import flag


@dataclass(frozen=True)
class PackConfig:
    """What the model card says besides what the model file holds."""

    TITLE = "Model card"

    evaluation: str = flag(
        "",
        "folder that evaluate.py wrote, or its metrics.json: its figures are put into the card",
        metavar="FOLDER",
        basic=True,
    )
    title: str = flag("", "of the card; '': the name of OUT", metavar="TITLE", basic=True)
