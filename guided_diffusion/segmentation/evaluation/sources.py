"""Where the masks of an evaluation come from: a model and radiographs, or files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from guided_diffusion.images.decoded import PixelSize
from guided_diffusion.images.masks import MaskRule, ignored_values
from guided_diffusion.images.names import ending, is_pattern
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import packed
from guided_diffusion.segmentation.categories import (
    ClassTable,
    check_same_classes,
    generic_categories,
    load_categories,
    table_of_masks,
)
from guided_diffusion.segmentation.evaluation.config import EvaluateConfig
from guided_diffusion.segmentation.evaluation.mask_pairs import (
    MaskPair,
    predict_mask_pairs,
    read_mask_pairs,
)
from guided_diffusion.segmentation.inference.averaging import AveragingConfig


@dataclass
class Source:
    """What all masks to compare with the same true masks have in common.

    :param truths: the true masks, a folder or a file.
    :param categories: the class table as far as flags determine it.
    """

    config: EvaluateConfig
    averaging: AveragingConfig
    truths: str
    categories: ClassTable | None

    def from_model(self, model: str, images: str) -> tuple[Iterator[MaskPair], ClassTable | None]:
        """A model's masks, and the class table: that of --categories, or else the model's."""
        config = self.config
        predictor = self.averaging.load(model)
        if self.categories and len(self.categories) != len(predictor.categories):
            raise UserError(
                f"{model} predicts {len(predictor.categories)} classes, not "
                f"{len(self.categories)}; leave out --num_classes and --categories or correct them"
            )
        pairs = predict_mask_pairs(
            predictor,
            images,
            self.truths,
            self._rule(predictor.categories),
            parse_spacing(config.spacing),
            config.batch_size,
        )
        return pairs, self.categories if config.categories else predictor.categories

    def from_files(
        self, masks: str, images: str = ""
    ) -> tuple[Iterator[MaskPair], ClassTable | None]:
        """Masks of a folder or a file, and the class table, if flags or the folders have one."""
        table = self.categories
        if table is None and not self.config.binary:
            table = table_of_both(masks, self.truths)
        pairs = read_mask_pairs(
            masks,
            self.truths,
            self._rule(table),
            parse_spacing(self.config.spacing),
            images,
        )
        return pairs, table

    def _rule(self, table: ClassTable | None) -> MaskRule:
        """What the values of the true masks mean, for classes of a table or of any number."""
        binary, ignore_index = self.config.binary, self.config.ignore_index
        if table is None:
            return MaskRule(None, ignored_values(ignore_index), binary)
        if self.categories:  # as many classes as the model's
            table = ClassTable(self.categories, (*self.categories.ignored, *table.ignored))
        return table.ignoring(ignore_index).mask_rule(binary)


def table_of_both(predicted: str, true: str) -> ClassTable | None:
    """The class table beside the predictions or the true masks; None if there is none.

    :raises UserError: if they have tables of different classes.
    """
    files = [file for file in map(table_of_masks, (predicted, true)) if file]
    tables = [load_categories(file) for file in files]
    if not tables:
        return None
    # a network that was trained without a table has made up its names
    named = [
        table
        for table in tables
        if [c.name for c in table] != [c.name for c in generic_categories(len(table))]
    ]
    if len(tables) == 2 and (len(named) != 1 or len(tables[0]) != len(tables[1])):
        remedy = "name the table that is right for both with --categories"
        check_same_classes(tables[0], tables[1], files, remedy)
    return ClassTable((named or tables)[0], tables[-1].ignored)


def is_model(path: str) -> bool:
    """Whether a path, or several with commas, names model files rather than masks."""
    holds_masks = os.path.isdir(path) and packed.find(path) is None
    return not (holds_masks or ending(path) or is_pattern(path))


def parse_spacing(text: str) -> PixelSize | None:
    """`"0.5"` or `"0.5,0.25"` to the size of a pixel in mm; None for the empty text."""
    if not text:
        return None
    try:
        sides = [float(side) for side in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not all(0 < side < float("inf") for side in sides):
        raise UserError(f"--spacing {text}: expected mm above 0, as HEIGHT or HEIGHT,WIDTH")
    return PixelSize(sides[0], sides[-1])
