"""The flags of the tools that prepare data."""

from dataclasses import dataclass

from guided_diffusion.runtime.command_line.flags import MOST_SEED, flag

# what becomes of colours of no class
UNKNOWN = ("error", "nearest", "background", "ignore")
FORMATS = {"tif": ".tif", "png": ".png"}
# as in segmentation/annotations/reading/formats.py, and masks in colours
ANNOTATION_FORMATS = (
    *("coco", "labelme", "cvat", "labelstudio", "via", "nnunet", "yolo", "slicer", "dicomseg"),
    "colours",
)


@dataclass(frozen=True)
class PrepareConfig:
    """The action to perform, and the files and numbers it needs."""

    TITLE = "Preparation"

    action: str = flag(
        "", "analyze, validate, organize, select or create-sample", metavar="ACTION", basic=True
    )
    image_dir: str = flag("", "folder of radiographs", basic=True)
    mask_dir: str = flag("", "folder of their masks", basic=True)
    source_dir: str = flag(
        "", "data set in any known layout, instead of the two folders", basic=True
    )
    output_dir: str = flag("", "folder for the results", "-o", "--output", basic=True)
    num_classes: int = flag(
        0,
        "number of classes, background included; 0: infer from --categories or the masks",
        least=0,
        most=256,
    )
    categories: str = flag("", "class table; '': flags/categories.json", basic=True)
    ignore_index: int = flag(
        -1,
        "value of mask pixels without a label, such as 255; -1: as the class table says",
        least=-1,
        most=2**16 - 1,
    )
    fix_issues: bool = flag(False, "validate: write a repaired copy to --output-dir", basic=True)
    train_split: float = flag(
        0.8, "organize, create-sample: share of the images for TRAIN", above=0, below=1, basic=True
    )
    train_images: int = flag(
        0, "organize, create-sample: number of images for TRAIN; 0: use --train-split", least=0
    )
    group: str = flag(
        "",
        "organize, select: how to identify the patient, so that none is in both TRAIN and VAL, or"
        " chosen twice: a regular"
        " expression searched for in the names (its first capture group, if any, is the patient),"
        " or a CSV file of lines NAME,PATIENT; '': as DICOM's PatientID or the names tell",
        basic=True,
    )
    seed: int = flag(0, "organize, create-sample: random seed", least=0, most=MOST_SEED, basic=True)
    checkpoint: str = flag("", "select: pretrained network, model*.pt or ema_*.pt", basic=True)
    k: int = flag(10, "select: number of radiographs to label", least=1, most=10**6, basic=True)
    skip_bad_images: bool = flag(False, "select: skip unreadable images, and list them")
    num_samples: int = flag(
        20, "create-sample: labelled radiographs", least=2, most=10**6, basic=True
    )
    num_unlabelled: int = flag(
        -1, "create-sample: unlabelled radiographs; -1: as many as labelled", least=-1, most=10**6
    )
    image_size: int = flag(256, "create-sample: height and width, pixels", least=16, most=2**13)


@dataclass(frozen=True)
class ConvertConfig:
    """How colour masks are converted."""

    TITLE = "Conversion"

    categories: str = flag("", "class table; '': flags/categories.json", basic=True)
    format: str = flag("tif", "file format, both lossless", choices=sorted(FORMATS), basic=True)
    unknown: str = flag(
        "error",
        "what to do about colours of no class: stop with an error, use the class of the nearest"
        " colour, use the background, or use the value that the class table ignores",
        choices=UNKNOWN,
        basic=True,
    )


@dataclass(frozen=True)
class ImportConfig:
    """What annotations of other tools become."""

    TITLE = "Import"

    format: str = flag(
        "auto",
        "which tool wrote SOURCE; auto: as its content tells",
        choices=("auto", *ANNOTATION_FORMATS),
        basic=True,
    )
    images: str = flag(
        "",
        "folder in which the images are searched for; '': that of SOURCE",
        metavar="FOLDER",
        basic=True,
    )
    map: str = flag(
        "",
        "classes to join, rename or leave out: NAME=CLASS,NAME=CLASS,NAME=; background and ignore"
        " are CLASSes too",
        metavar="NAME=CLASS,...",
        basic=True,
    )
    priority: str = flag(
        "",
        "where annotations overlap, CLASS,CLASS,..., the topmost first; '': the later drawn",
        metavar="CLASS,...",
    )
    unlabelled: str = flag(
        "background",
        "what pixels without an annotation are: background, or without a label (255)",
        choices=("background", "ignore"),
        basic=True,
    )
    empty: str = flag(
        "skip",
        "what images without any annotation are: not annotated yet, or all background",
        choices=("skip", "background"),
        basic=True,
    )
    annotator: str = flag(
        "",
        "whose annotations count where several people drew on one image: a name, first, or vote"
        " (what more than half of them say)",
        metavar="NAME",
    )
    attribute: str = flag(
        "",
        "attribute whose value is the class (CVAT, VIA); '': the label, or the only attribute",
        metavar="NAME",
    )
    line_width: float = flag(
        1.0, "width of lines, which have none in the files, pixels; 0 omits them", least=0, most=1e4
    )
    categories: str = flag(
        "",
        "class table whose indices the masks get; '': one is made of the names in SOURCE",
        basic=True,
    )
    skip_missing: bool = flag(False, "leave out annotations whose images are missing")
    into: str = flag(
        "",
        "instead of OUTPUT: folder of labelled radiographs, such as Split/TRAIN, that the images"
        " and masks join; the masks get the indices of its categories.json, or of --categories",
        metavar="FOLDER",
        basic=True,
    )
    avoid: tuple[str, ...] = flag(
        (),
        "with --into: folders of radiographs, such as Split/VAL, none of whose images and patients"
        " may join; without it, folders VAL and TEST beside --into",
        type=str,
        nargs="+",
        metavar="FOLDER",
    )
    replace: bool = flag(
        False, "with --into: replace the masks of images that are there already, which is refused"
    )
    group: str = flag(
        "",
        "with --into: how to identify the patient: a regular expression searched for in the names"
        " (its first capture group, if any, is the patient), or a CSV file of lines NAME,PATIENT;"
        " '': as DICOM's PatientID or the names tell",
    )
