"""The folders of labelled images on the command line."""

import argparse
import dataclasses

from guided_diffusion.runtime.command_line.flags import Overrides
from guided_diffusion.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Folders:
    """Folders of radiographs and of their masks, to train on and to validate on."""

    train: tuple[str, str]
    val: tuple[str, str] | None

    @classmethod
    def add_to(
        cls, parser: argparse.ArgumentParser, default: tuple[str, str] | None = None
    ) -> None:
        """Add the positional arguments TRAIN_IMG TRAIN_MASK [VAL_IMG VAL_MASK].

        :param default: makes the first two optional.
        """
        nargs = "?" if default else None
        image, mask = (f" (default: {folder})" for folder in default) if default else ("", "")
        parser.add_argument("train_img", nargs=nargs, help=f"folder of radiographs{image}")
        parser.add_argument("train_mask", nargs=nargs, help=f"folder of their masks{mask}")
        parser.add_argument("val_img", nargs="?", help="folder of radiographs to validate on")
        parser.add_argument("val_mask", nargs="?", help="folder of their masks")

    @classmethod
    def from_flags(cls, overrides: Overrides, default: tuple[str, str] = ("", "")) -> "Folders":
        """:raises UserError: if one folder of a pair is missing."""
        pairs = {}
        for part in ("train", "val"):
            given = [
                overrides[f"{part}_{k}"] for k in ("img", "mask") if f"{part}_{k}" in overrides
            ]
            if len(given) == 1:
                part = part.upper()
                raise UserError(f"{part}_IMG without {part}_MASK: pass both folders or neither")
            pairs[part] = (given[0], given[1]) if given else None
        return cls(pairs["train"] or default, pairs["val"])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [self.train] if self.val is None else [self.train, self.val]
