"""The flags of the commands that evaluate."""

from dataclasses import dataclass

from guided_diffusion.images.masks import BINARY_HELP
from guided_diffusion.runtime.command_line.flags import MOST_BATCH, MOST_SEED, flag
from guided_diffusion.runtime.command_line.precision_flag import precision_flag


@dataclass(frozen=True)
class EvaluateConfig:
    """What to compare, and how."""

    TITLE = "Evaluation"
    SECTION = "evaluate"

    model: str = flag(
        "",
        "model file to predict with; several, with commas: their mean",
        "-m",
        "--checkpoint",
        basic=True,
    )
    compare: tuple[str, ...] = flag(
        (),
        "two model files, or folders of masks: is the second better?",
        type=str,
        nargs=2,
        metavar="A B",
        basic=True,
    )
    images: str = flag(
        "",
        "the masks' radiographs, for the report and the size of their pixels",
        metavar="FOLDER",
        basic=True,
    )
    output: str = flag(
        "", "folder for figures and pictures, see docs/prediction.md", "-o", basic=True
    )
    categories: str = flag("", "class table, a file like flags/categories.json", basic=True)
    num_classes: int = flag(
        0,
        "number of classes; 0: from --categories, the model or the masks' values",
        least=0,
        most=256,
        basic=True,
    )
    binary: bool = flag(
        False, "join all foreground classes; masks may also be black and white", basic=True
    )
    ignore_index: int = flag(
        -1,
        "value of pixels in the true masks that no figure counts, such as 255; -1: what the class"
        " table or the model says",
        least=-1,
        most=2**16 - 1,
        basic=True,
    )
    surface: bool = flag(
        False, "95 % Hausdorff and average surface distance (HD95, ASD)", basic=True
    )
    spacing: str = flag(
        "",
        "size of a pixel in mm, HEIGHT[,WIDTH], for files that record none in the patient",
        metavar="MM",
        basic=True,
    )
    bootstrap: int = flag(
        2000, "bootstrap draws for the 95 % intervals; 0: no intervals", least=0, most=10**6
    )
    bootstrap_seed: int = flag(
        0, "seed of these draws, and of the permutation test", least=0, most=MOST_SEED
    )
    report: bool = flag(True, "with --output, also write report.html, to browse the results")
    batch_size: int = flag(8, "radiographs per forward pass", least=1, most=MOST_BATCH)


@dataclass(frozen=True)
class GuidanceConfig:
    """In which precision to predict, and what to write."""

    TITLE = "Evaluation"

    output: str = flag(
        "", "folder for tables and pictures; '': FOLDER/faithfulness", "-o", basic=True
    )
    precision: str = precision_flag()


@dataclass(frozen=True)
class RunsConfig:
    """The runs of a comparison: what is common to all of them."""

    checkpoint: str = flag("", "pretrained network: model*.pt or ema_*.pt", basic=True)
    batch_size: int = flag(2, "images per step", "-b", least=1, most=MOST_BATCH)
    common: str = flag(
        "", "further flags of every training, in quotes", metavar="FLAGS", basic=True
    )
    precision: str = precision_flag()
    categories: str = flag(
        "", "class table (JSON); '': flags/categories.json where it fits", basic=True
    )
    out_channels: int = flag(
        0,
        "number of classes including background; 0: infer from categories or masks",
        least=0,
        most=256,
    )
    binary: bool = flag(False, BINARY_HELP)
    ignore_index: int = flag(
        -1,
        "value of mask pixels that no loss or score counts; -1: as the class table says",
        least=-1,
        most=2**16 - 1,
    )
    keep_models: bool = flag(False, "keep the network of every run")
    jobs: int = flag(
        0,
        "runs at a time, each with its share of the cores; 0: one per core, up to 4; one on a GPU",
        "-j",
        least=0,
        most=256,
        basic=True,
    )


@dataclass(frozen=True)
class LoopConfig(RunsConfig):
    """What is labelled in which order, and what learns from it."""

    TITLE = "Loop"

    start: int = flag(
        4, "images that are labelled at first, drawn by the seed", least=1, most=10**6, basic=True
    )
    add: int = flag(4, "images that each round adds", least=1, most=10**6, basic=True)
    rounds: int = flag(
        3, "rounds of choosing, labelling and training", least=1, most=1000, basic=True
    )
    seeds: str = flag(
        "0,1,2", "seeds of the first images and of training, comma-separated", basic=True
    )
    choose: str = flag(
        "next,random",
        "what to compare, comma-separated: next, as predict.py --label_next chooses; uncertain, the"
        " least certain alone; random",
        metavar="NAME,...",
        basic=True,
    )
    method: str = flag(
        "recipe",
        "what learns, as in label_efficiency.py --methods: recipe, plain, imagenet, ...",
        metavar="NAME",
        basic=True,
    )
    steps: int = flag(200, "optimisation steps of every training", least=1, basic=True)
    output: str = flag("simulate_loop", "folder for runs, tables and the plot", "-o", basic=True)


@dataclass(frozen=True)
class LabelEfficiencyConfig(RunsConfig):
    """What to compare."""

    TITLE = "Comparison"

    k: str = flag(
        "1,2,5,10", "numbers of labelled images, comma-separated", metavar="N,...", basic=True
    )
    seeds: str = flag(
        "0,1,2", "seeds of the drawn images and of training, comma-separated", basic=True
    )
    choose: str = flag(
        "draw",
        "which images are labelled: draw them by the seed, or select those that stand for the"
        " others, as prepare_data.py --action select does",
        choices=("draw", "select"),
    )
    methods: str = flag(
        "recipe,partner,imagenet,scratch,features",
        "built in or from --method, comma-separated",
        metavar="NAME,...",
        basic=True,
    )
    steps: int = flag(
        0,
        "optimisation steps of every run; 0: each method has its own steps and learning rate,"
        " chosen by folds inside TRAIN",
        least=0,
        basic=True,
    )
    tune_steps: str = flag("200,400,800", "with --steps 0: steps to choose from, comma-separated")
    tune_lr: str = flag(
        "3e-4,1e-3,3e-3,1e-2,3e-2", "with --steps 0: learning rates to choose from, comma-separated"
    )
    folds: int = flag(
        0,
        "cross-validate on TRAIN in this many folds, instead of evaluating on TEST; 0: TEST",
        least=0,
        most=1000,
        basic=True,
    )
    output: str = flag("label_efficiency", "folder for runs, tables and the plot", "-o", basic=True)
