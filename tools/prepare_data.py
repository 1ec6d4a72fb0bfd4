"""Look at a data set, check and mend it, divide it into TRAIN and VAL, or make a sample of one.

prepare_data.py --action analyze      what it is like, and which settings follow
prepare_data.py --action validate     what a training run would refuse or regret; --fix-issues
prepare_data.py --action organize     Split/TRAIN/{IMG,MASK} and Split/VAL/{IMG,MASK}
prepare_data.py --action create-sample  synthetic bitewings with exact masks
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.preparation import layouts, overview
from guided_diffusion.preparation.analysis import analyze
from guided_diffusion.preparation.faults import fault_table
from guided_diffusion.preparation.organize import is_divided, keep_split, place, write_split
from guided_diffusion.preparation.phantoms import write_dataset
from guided_diffusion.preparation.repair import require_new_folder, write_faults, write_repaired
from guided_diffusion.preparation.validation import validate
from guided_diffusion.runtime.errors import UserError, command
from guided_diffusion.runtime.files import save_json
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.segmentation.categories import Category, categories_for, load_categories

PLACES = ("image_dir", "mask_dir", "source_dir", "output_dir")
CLASSES = ("num_classes", "categories")
ACTIONS = {
    "analyze": (*PLACES, *CLASSES),
    "validate": (*PLACES, *CLASSES, "fix_issues"),
    "organize": (*PLACES, "train_split", "train_images", "group", "seed"),
    "create-sample": (
        *("output_dir", "num_samples", "num_unlabelled", "image_size"),
        *("train_split", "train_images", "seed"),
    ),
}
FAULTS_LEFT = 1


@dataclass(frozen=True)
class PrepareConfig:
    """What to do, and with which files"""

    TITLE = "Preparation"

    action: str = flag("", "analyze, validate, organize or create-sample")
    image_dir: str = flag("", "folder of radiographs")
    mask_dir: str = flag("", "folder of their masks")
    source_dir: str = flag("", "instead of these two: a data set in any layout that is known")
    output_dir: str = flag("", "folder for the results")
    num_classes: int = flag(0, "classes, background counted; 0: as --categories or the masks tell")
    categories: str = flag("", "class table; '': flags/categories.json")
    fix_issues: bool = flag(False, "validate: write a repaired copy to --output-dir")
    train_split: float = flag(0.8, "organize: share of the images that go to TRAIN")
    train_images: int = flag(0, "number of images that go to TRAIN; 0: as --train-split says")
    group: str = flag(
        "",
        "organize: what tells the patient, none of whom comes to both sides: a regular expression"
        " searched in the names (its first group counts), or a CSV file of lines NAME,PATIENT",
    )
    seed: int = flag(0, "organize, create-sample: another seed, another choice")
    num_samples: int = flag(20, "create-sample: labelled radiographs")
    num_unlabelled: int = flag(-1, "create-sample: unlabelled radiographs; -1: as many as labelled")
    image_size: int = flag(256, "create-sample: height and width, pixels")


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0], PrepareConfig)
    overrides = parse_flags(parser)
    config = from_flags(PrepareConfig, overrides)
    action = config.action.lower().replace("_", "-")
    if action not in ACTIONS:
        raise UserError(f"--action {config.action or 'is missing'}: one of {', '.join(ACTIONS)}")
    idle = [name for name in overrides if name not in (*ACTIONS[action], "action")]
    if idle:
        flags = ", ".join(f"--{name}" for name in idle)
        raise UserError(f"{flags}: of no effect with --action {action}; leave it out")
    if action == "create-sample":
        return run_create_sample(config)
    found = layouts.sources(config.source_dir, config.image_dir, config.mask_dir)
    items, unpaired = layouts.list_items(found)
    if action == "analyze":
        return run_analyze(config, items, unpaired)
    if action == "validate":
        return run_validate(config, items, unpaired)
    return run_organize(config, overrides, items, unpaired)


def run_analyze(config: PrepareConfig, items: Sequence, unpaired: Sequence) -> int:
    result = analyze(items)
    if not result.facts:
        raise UserError(f"none of {len(items)} images can be read; see --action validate")
    categories = _table(config, result.num_classes())
    summary = overview.summarize(result, categories)
    print(overview.table(result, summary))
    if result.unreadable or unpaired:
        print(
            f"{len(result.unreadable)} images could not be read with their masks and "
            f"{len(unpaired)} files have no partner; see --action validate"
        )
    if config.output_dir:
        paths = [
            os.path.join(config.output_dir, name) for name in ("analysis.json", "analysis.png")
        ]
        save_json(paths[0], summary)
        overview.plot(result, categories, paths[1])
        print("written: " + ", ".join(paths))
    return 0


def run_validate(config: PrepareConfig, items: Sequence, unpaired: Sequence) -> int:
    if config.fix_issues:
        originals = (config.source_dir, config.image_dir, config.mask_dir)
        require_new_folder(config.output_dir, *originals)
    categories = _table(config, config.num_classes)
    num_classes = config.num_classes or (len(categories) if config.categories else None)
    report = validate(items, unpaired, num_classes, categories)
    print(f"{len(items)} images checked, {len(report.faults)} faults")
    if num_classes is None and any(item.mask for item in items):
        print("the number of classes is not known: give --num-classes to have the values checked")
    if report.faults:
        print(fault_table(report.faults))
    left = report.faults
    if config.fix_issues:
        left = write_repaired(items, unpaired, report, config.output_dir, num_classes, categories)
        print(
            f"repaired copy in {config.output_dir}, what was done in fixes.csv; {len(left)} faults "
            "are as they were"
        )
    if config.output_dir:
        print("written: " + write_faults(report.faults, config.output_dir))
    return FAULTS_LEFT if left else 0


def run_organize(
    config: PrepareConfig, overrides: dict, items: Sequence, unpaired: Sequence
) -> int:
    originals = (config.source_dir, config.image_dir, config.mask_dir)
    require_new_folder(config.output_dir, *originals)
    if unpaired:
        raise UserError(
            f"{len(unpaired)} files do not pair, such as {unpaired[0].path}; see --action validate"
        )
    if "train_split" in overrides and "train_images" in overrides:
        raise UserError("give either --train_split or --train_images, not both")
    _check_share(config.train_split)
    if {"train_split", "train_images", "group"} & set(overrides) or not is_divided(items):
        wanted = config.train_images or config.train_split
        placed = place(items, wanted, config.group, config.seed)
    else:
        print("the split of the source is kept; --train-split or --train-images make a new one")
        placed = keep_split(items)
    folder = os.path.join(config.output_dir, "Split")
    table = write_split(placed, folder)
    count = {split: sum(p.split == split for p in placed) for split in ("TRAIN", "VAL", "TEST")}
    if config.train_images and count["TRAIN"] != config.train_images:
        print(f"{count['TRAIN']} images for TRAIN, not {config.train_images}: groups stay together")
    counts = ", ".join(f"{number} {split}" for split, number in count.items() if number)
    print(f"{counts} in {folder}, listed in {table}")
    return 0


def run_create_sample(config: PrepareConfig) -> int:
    require_new_folder(config.output_dir)
    if config.num_samples < 2:
        raise UserError(
            f"--num_samples {config.num_samples}: at least 2, one to train, one to check"
        )
    _check_share(config.train_split)
    train = config.train_images or round(config.train_split * config.num_samples)
    train = min(max(1, train), config.num_samples - 1)
    val = config.num_samples - train
    unlabelled = config.num_samples if config.num_unlabelled < 0 else config.num_unlabelled
    size = (config.image_size, config.image_size)
    write_dataset(config.output_dir, unlabelled, train, val, size, config.seed)
    print(
        f"{config.output_dir}: {unlabelled} in unlabelled/, {train} in Split/TRAIN, "
        f"{val} in Split/VAL"
    )
    return 0


def _table(config: PrepareConfig, seen: int) -> tuple[Category, ...]:
    """The class table that was asked for, or one for as many classes as there are."""
    if config.num_classes:
        return categories_for(config.num_classes, config.categories)
    if config.categories or not seen:
        table = load_categories(config.categories or None)
        if seen > len(table):
            raise UserError(
                f"the masks hold {seen} classes, {config.categories} lists {len(table)}"
            )
        return table
    return categories_for(max(2, seen))


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise UserError(f"--train_split {share}: a share between 0 and 1")


if __name__ == "__main__":
    command(main)()
