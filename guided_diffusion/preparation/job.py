"""What tools/prepare_data.py does: analyse, validate, divide or generate a data set, or choose."""

import dataclasses
import os

from guided_diffusion.images.files import Unpaired
from guided_diffusion.preparation import layouts, overview
from guided_diffusion.preparation.analysis import analyze
from guided_diffusion.preparation.config import PrepareConfig
from guided_diffusion.preparation.layouts import Item, require_new_folder
from guided_diffusion.preparation.mask_repair import SetValues
from guided_diffusion.preparation.organize import by_patient, keep, leaks, place, write_split
from guided_diffusion.preparation.phantoms import write_dataset
from guided_diffusion.preparation.repair import write_repaired
from guided_diffusion.preparation.validation import MaskReading, fault_table, validate
from guided_diffusion.runtime.command_line.flags import Overrides, from_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.files import check_output, save_json
from guided_diffusion.segmentation.categories import (
    ClassTable,
    categories_for,
    load_categories,
)

PLACES = ("image_dir", "mask_dir", "source_dir", "output_dir")
CLASSES = ("num_classes", "categories", "ignore_index")
ACTIONS = {
    "analyze": (*PLACES, *CLASSES),
    "validate": (*PLACES, *CLASSES, "fix_issues"),
    "organize": (*PLACES, "train_split", "train_images", "group", "seed"),
    "select": ("image_dir", "output_dir", "checkpoint", "k", "group", "skip_bad_images"),
    "create-sample": (
        *("output_dir", "num_samples", "num_unlabelled", "image_size"),
        *("train_split", "train_images", "seed"),
    ),
}
FAULTS_LEFT = 1


def run(overrides: Overrides) -> int:
    """Perform the action that the flags name.

    :param overrides: the flags given.
    :return: the exit code.
    :raises UserError: if the flags or the data set do not allow the action.
    """
    config = from_flags(PrepareConfig, overrides)
    action = config.action.lower().replace("_", "-")
    if action not in ACTIONS:
        raise UserError(f"--action {config.action or 'is missing'}: one of {', '.join(ACTIONS)}")
    unused = [name for name in overrides if name not in (*ACTIONS[action], "action")]
    if unused:
        flags = ", ".join(f"--{name}" for name in unused)
        raise UserError(f"no effect with --action {action}: {flags}; leave out what is not needed")
    if action == "create-sample":
        return create_sample(config)
    if action == "select":
        from guided_diffusion.preparation.selection import select  # the only one that needs torch

        return select(config)
    if config.output_dir:
        check_output(config.output_dir, folder=True)
    sources = layouts.sources(config.source_dir, config.image_dir, config.mask_dir)
    items, unpaired = layouts.list_items(sources)
    if action == "analyze":
        return analyze_items(config, items, unpaired)
    if action == "validate":
        return validate_items(config, items, unpaired)
    return organize_items(config, overrides, items, unpaired)


def analyze_items(config: PrepareConfig, items: list[Item], unpaired: list[Unpaired]) -> int:
    """Describe the data set and recommend settings."""
    declared = load_categories(config.categories) if config.categories else ClassTable(())
    result = analyze(items, declared.ignoring(config.ignore_index).mask_rule().ignore)
    if not result.facts:
        raise UserError(
            f"none of {len(items)} images can be read; see --action validate; the first:"
            f" {result.unreadable[0]}"
        )
    categories = _table(config, result.num_classes())
    summary = overview.summarize(result, categories)
    print(overview.table(result, summary))
    if result.unreadable or unpaired:
        print(
            f"{len(result.unreadable)} images or their masks could not be read, and "
            f"{len(unpaired)} files do not pair; see --action validate"
        )
    if config.output_dir:
        stem = os.path.join(config.output_dir, "analysis")
        save_json(f"{stem}.json", summary)
        overview.plot(result, categories, f"{stem}.png")
        print(f"written: {stem}.json, {stem}.png")
    return 0


def validate_items(config: PrepareConfig, items: list[Item], unpaired: list[Unpaired]) -> int:
    """List the faults of the data set; with --fix-issues write a repaired copy."""
    if config.fix_issues:
        require_new_folder(config.output_dir, config.source_dir, config.image_dir, config.mask_dir)
    table = _table(config, config.num_classes)
    num_classes = config.num_classes or (len(table) if config.categories else None)
    rule = dataclasses.replace(table.mask_rule(), classes=num_classes)
    whole = SetValues.of((item.mask for item in items if item.mask), rule)
    reading = MaskReading(rule, table if num_classes else ClassTable(()), whole)
    report = validate(items, unpaired, reading)
    print(f"{len(items)} images checked, {len(report.faults)} faults")
    if num_classes is None and any(item.mask for item in items):
        say("the number of classes is unknown: give --num-classes to check the values of masks")
    for line in leaks(by_patient(items)):
        print(line)
    if report.faults:
        print(fault_table(report.faults))
    left = report.faults
    if config.fix_issues:
        left = write_repaired(items, unpaired, report, config.output_dir, reading)
        print(
            f"repaired copy in {config.output_dir}, changes listed in fixes.csv;"
            f" {len(left)} faults were not fixed"
        )
        if report.lost:
            print(
                f"classes {', '.join(map(str, sorted(report.lost)))} are only in masks that were"
                " left out: repair those by hand, or the class is lost"
            )
    if config.output_dir:
        path = os.path.join(config.output_dir, "faults.json")
        save_json(path, [fault.to_plain() for fault in report.faults])
        print(f"written: {path}")
    return FAULTS_LEFT if left else 0


def organize_items(
    config: PrepareConfig, overrides: Overrides, items: list[Item], unpaired: list[Unpaired]
) -> int:
    """Copy the data set to Split/TRAIN and Split/VAL."""
    require_new_folder(config.output_dir, config.source_dir, config.image_dir, config.mask_dir)
    if unpaired:
        raise UserError(
            f"{len(unpaired)} files do not pair, such as {unpaired[0].path}; see --action validate"
        )
    if "train_split" in overrides and "train_images" in overrides:
        raise UserError("give either --train_split or --train_images, not both")
    divided = {"TRAIN", "VAL"} <= {item.split for item in items}
    if {"train_split", "train_images", "group"} & set(overrides) or not divided:
        wanted = config.train_images or config.train_split
        placed, notes = place(items, wanted, config.group, config.seed)
    else:
        say("keeping the split of the data set; --train-split or --train-images make a new one")
        placed, notes = keep(items)
    folder = os.path.join(config.output_dir, "Split")
    table = write_split(placed, folder)
    for note in notes:
        say(note)
    count = {split: sum(p.split == split for p in placed) for split in ("TRAIN", "VAL", "TEST")}
    if config.train_images and count["TRAIN"] != config.train_images:
        say(f"{count['TRAIN']} images in TRAIN, not {config.train_images}: groups stay together")
    counts = ", ".join(f"{number} {split}" for split, number in count.items() if number)
    print(f"{counts} in {folder}, listed in {table}")
    return 0


def create_sample(config: PrepareConfig) -> int:
    """Generate synthetic radiographs with masks."""
    require_new_folder(config.output_dir)
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


def _table(config: PrepareConfig, seen: int) -> ClassTable:
    """The class table that the flags name, else one for the number of classes seen in the masks."""
    if config.num_classes:
        table = categories_for(config.num_classes, config.categories)
    elif config.categories or not seen:
        table = load_categories(config.categories or None)
        if seen > len(table):
            raise UserError(
                f"the masks hold {seen} classes, {config.categories} lists {len(table)}"
            )
    else:
        table = categories_for(max(2, seen))
    return table.ignoring(config.ignore_index)
