"""The flags of linear probes."""

from dataclasses import dataclass

from guided_diffusion.runtime.command_line.flags import flag


@dataclass(frozen=True)
class TrainingProbeConfig:
    """Probes while a network is pretrained."""

    TITLE = "Probe"

    probe_dir: str = flag(
        "",
        "labelled images, TRAIN and VAL with IMG and MASK in each: how well a linear classifier of"
        " the network's features segments them, see docs/checkpoints.md; '': no probe",
        basic=True,
    )
    probe_interval: int = flag(1000, "steps between probes", least=1)
    probe_categories: str = flag(
        "", "class table of these masks (JSON); '': flags/categories.json where it fits"
    )


@dataclass(frozen=True)
class ProbeConfig:
    """Probes of the checkpoints of a run."""

    TITLE = "Probe"

    categories: str = flag(
        "", "class table (JSON); '': flags/categories.json where it fits", basic=True
    )
    output: str = flag(
        "", "folder for probe.json and probe.png; '': the run's folder", "-o", basic=True
    )
