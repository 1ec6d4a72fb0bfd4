"""The flags of the commands that predict, but for those that they share, see `averaging.py`."""

from dataclasses import dataclass

from guided_diffusion.runtime.command_line.flags import MOST_BATCH, flag

TTA = ("none", "flips", "shifts", "all")


@dataclass(frozen=True)
class PredictConfig:
    """What to segment, and what to write."""

    TITLE = "Prediction"
    SECTION = "predict"

    model: str = flag("", "same as the argument MODEL", "-m", "--checkpoint")
    input: tuple[str, ...] = flag(
        (), "same as INPUT; one or more", "-i", type=str, nargs="+", metavar="FILE"
    )
    output: tuple[str, ...] = flag(
        (),
        "same as OUTPUT; or one mask file per radiograph",
        "-o",
        type=str,
        nargs="+",
        metavar="FOLDER",
    )
    categories: str = flag(
        "", "class table (JSON) to use instead of the model's names and colours", basic=True
    )
    save_probabilities: bool = flag(
        False, "also write PROBABILITIES/NAME.npz, float16 [C x H x W]", basic=True
    )
    save_uncertainty: bool = flag(
        False, "also write UNCERTAINTY/NAME.png, and .npz in float16", basic=True
    )
    mask_threshold: float | None = flag(
        None,
        "two classes: probability above which a pixel is foreground",
        "-t",
        type=float,
        least=0,
        most=1,
        basic=True,
    )
    viz: bool = flag(False, "show each radiograph in a window", "-v")
    no_save: bool = flag(False, "write nothing", "-n")
    batch_size: int = flag(8, "radiographs per forward pass", least=1, most=MOST_BATCH, basic=True)
    skip_bad_images: bool = flag(False, "skip files that cannot be read, and list them", basic=True)
    report: bool = flag(True, "also write report.html, to browse the results", basic=True)
    interactive: bool = flag(False, "ask for paths, one per line, until an empty line")


@dataclass(frozen=True)
class LabelNextConfig:
    """Which radiographs a person is to correct next."""

    TITLE = "Correcting"

    label_next: int = flag(
        0,
        "write OUTPUT/LABEL_NEXT: so many radiographs to correct next, which the model is unsure of"
        " and which are unlike each other, with their predictions as annotations: of LabelMe, or as"
        " --export says; 0: none",
        least=0,
        most=10**6,
        basic=True,
    )
    labelled: str = flag(
        "",
        "label_next: folder of radiographs that are labelled already, such as Split/TRAIN; those"
        " chosen are unlike them, and of other patients",
        metavar="FOLDER",
        basic=True,
    )
    avoid: tuple[str, ...] = flag(
        (),
        "label_next: folders of radiographs to measure on, such as Split/VAL: none of their images"
        " and patients is chosen; without it, folders VAL and TEST beside --labelled",
        type=str,
        nargs="+",
        metavar="FOLDER",
    )
    group: str = flag(
        "",
        "label_next: how to identify the patient, of whom one radiograph is chosen: a regular"
        " expression searched for in the names (its first capture group, if any, is the patient),"
        " or a CSV file of lines NAME,PATIENT; '': as DICOM's PatientID or the names tell",
    )


@dataclass(frozen=True)
class ServeConfig:
    """Where the page is served."""

    TITLE = "Server"

    host: str = flag(
        "127.0.0.1",
        "address to listen on; 0.0.0.0 accepts other machines",
        metavar="ADDRESS",
        basic=True,
    )
    allow_hosts: str = flag(
        "",
        "further names by which browsers may reach the page, comma-separated; always: host,"
        " localhost, and with 0.0.0.0 this machine's name and every IP address",
        metavar="NAME,...",
    )
    port: int = flag(7860, "port number", least=1, most=2**16 - 1, basic=True)
    max_upload_mb: int = flag(64, "largest file accepted, in MB", least=1, most=10**5)
    save_dir: str = flag(
        "",
        "folder for radiographs and their masks as corrected on the page: IMG, MASK,"
        " categories.json; '': no corrections",
        "-o",
        "--output",
        basic=True,
    )
