"""Prediction as a command: radiographs to results, with reading, network and writing overlapped."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from guided_diffusion import dist_util
from guided_diffusion.images.image_io import ImageError, check_images
from guided_diffusion.images.left_out import EXPORT_FOLDER
from guided_diffusion.images.masks import LOSSLESS_EXTENSIONS, write_mask
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say, warn
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.signals import EXIT_STOPPED, StopRequest
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.storage.files import (
    check_output,
    check_outputs,
    expand_path,
    save_json,
    write_csv,
)
from guided_diffusion.segmentation.annotations.writing.config import ExportConfig, parse_formats
from guided_diffusion.segmentation.annotations.writing.export import Export
from guided_diffusion.segmentation.categories import (
    TABLE_NAME,
    Category,
    categories_for,
    check_same_classes,
    load_categories,
    to_plain,
)
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.inference.config import LabelNextConfig, PredictConfig
from guided_diffusion.segmentation.inference.predictor import Finish, Segmenter
from guided_diffusion.segmentation.inference.results import (
    AreasRow,
    Item,
    Result,
    describe,
    find_items,
    masks_of_others,
    result_paths,
    write_result,
)
from guided_diffusion.segmentation.inference.uncertainty import next_to_label
from guided_diffusion.segmentation.pipeline import in_batches, prefetch
from guided_diffusion.segmentation.visuals.render import show
from guided_diffusion.segmentation.visuals.report import Card, Report

if TYPE_CHECKING:
    from guided_diffusion.segmentation.inference.label_next import LabelNext


class Paths(NamedTuple):
    """The model file or files, the radiographs, and the folder or the masks' files to write."""

    model: str
    inputs: list[str]
    outputs: list[str]


def paths_from_arguments(config: PredictConfig, arguments: Sequence[str]) -> Paths:
    """The paths that flags name; the others from positional arguments.

    :param arguments: MODEL, INPUT and OUTPUT, without those that flags name.
    """
    rest = list(arguments)
    model = config.model or (rest.pop(0) if rest else "")
    takes_input = not config.interactive
    inputs = list(config.input) or ([rest.pop(0)] if rest and takes_input else [])
    outputs = list(config.output) or ([rest.pop(0)] if rest else ["results"])
    if rest:
        raise UserError(
            f"{rest[0]!r} is one argument too many: expected MODEL INPUT OUTPUT, or flags (several "
            "files after --input); put a glob in quotes"
        )
    if not model:
        raise UserError("the following arguments are required: model, input (see --help)")
    if not inputs and takes_input:
        raise UserError("the following arguments are required: input (see --help)")
    if inputs and not takes_input:
        raise UserError("--interactive asks for the radiographs: leave out --input")
    return Paths(model, inputs, outputs)


class Written(NamedTuple):
    """What is kept of a radiograph whose files are written. result: where it is to be shown."""

    row: AreasRow
    card: Card | None
    result: Result | None


@dataclass
class Job:
    """A predictor and what is done with its predictions.

    :param files: each radiograph's mask file, by name, instead of a folder of results.
    :param export: writes files of annotation tools besides.
    :param next: writes those to correct next at the end.
    """

    predictor: Segmenter
    config: PredictConfig
    categories: tuple[Category, ...]
    output: str
    files: Mapping[str, str]
    export: Export | None = None
    next: "LabelNext | None" = None

    def run(self, items: Sequence[Item]) -> int:
        """Segment all radiographs; returns the exit code."""
        if not self.config.skip_bad_images:
            check_images([item.path for item in items])
        orders = (("uncertainty", True), ("name", False))
        report = Report("Segmented radiographs", self.categories, orders, ("area %",))
        rows: list[AreasRow] = []
        skipped: list[ImageError] = []
        with StopRequest() as stop, progress_bar(len(items), unit="image") as bar:
            results = self._results(items, skipped, bar, stop)
            for written in prefetch(self._write, results, ahead=3):
                rows.append(written.row)
                if written.card:
                    report.add(written.card)
                bar.update()
                self._show(written.result)
        for error in skipped:
            warn(f"skipped: {error}")
        if not rows and not stop.requested:
            raise UserError(f"none of the {len(items)} files can be read; see the lines above")
        if rows:
            self._summarise(rows, report)
        if stop.requested:
            say(f"stopped by {stop.requested} after {len(rows)} of {len(items)} radiographs")
            return EXIT_STOPPED
        if self.next:
            self.next.write()
        return 0

    def _results(
        self, items: Sequence[Item], skipped: list[ImageError], bar: tqdm, stop: StopRequest
    ) -> Iterator[Callable[[], Result]]:
        """Functions that complete one result each, once the network has seen the radiograph."""
        size = self.config.batch_size
        for batch in in_batches(prefetch(self._read, items, ahead=size), size):
            if stop.requested:
                return
            readable: list[tuple[Item, np.ndarray]] = []
            for item, image in batch:
                if not isinstance(image, ImageError):
                    readable.append((item, image))
                elif self.config.skip_bad_images:
                    skipped.append(image)
                    bar.update()
                else:
                    raise image
            started = self.predictor.start([image for _, image in readable])
            for (item, image), finish in zip(readable, started):
                yield partial(self._complete, item, image, finish)

    def _read(self, item: Item) -> tuple[Item, np.ndarray | ImageError]:
        try:
            return item, self.predictor.read(item.path)
        except ImageError as error:
            return item, error

    def _complete(self, item: Item, image: np.ndarray, finish: Finish) -> Result:
        prediction = finish()
        return Result(item, image, prediction.mask(self.config.mask_threshold), prediction)

    def _write(self, complete: Callable[[], Result]) -> Written:
        result, config = complete(), self.config
        if self.files and not config.no_save:
            write_mask(self.files[result.item.name], result.mask)
        elif not config.no_save:
            saving = (config.save_probabilities, config.save_uncertainty)
            write_result(self.output, result, self.categories, *saving)
        if self.export:
            self.export.add(result.item, result.mask)
        if self.next:
            self.next.add(result)
        row = result.areas(self.categories)
        card = result.card(row, self.categories) if self._reporting else None
        return Written(row, card, result if config.viz else None)

    @property
    def _reporting(self) -> bool:
        config = self.config
        return config.report and not (config.no_save or self.files or config.interactive)

    def _show(self, result: Result | None) -> None:
        if result:
            show(result.item.name, result.image, result.mask, self.categories)

    def _summarise(self, rows: Sequence[AreasRow], report: Report) -> None:
        if len(rows) > 1 and not self.next:
            scores = {row["name"]: row["uncertainty"] for row in rows}
            name = next_to_label(scores)
            print(f"to label next: {name}, the least certain (uncertainty {scores[name]:.4f})")
        if self.config.no_save:
            return
        if self.files:
            print(f"{len(rows)} masks written")
            return
        path = os.path.join(self.output, "areas.csv")
        write_csv(path, list(rows[0]), (row.values() for row in rows))
        save_json(os.path.join(self.output, TABLE_NAME), to_plain(self.categories))
        if self.export:
            self.export.close()
        if self._reporting:
            facts = (("radiographs", len(rows)), ("model", self.config.model))
            report.write(os.path.join(self.output, "report.html"), facts)
        print(f"{len(rows)} radiographs segmented; results in {os.path.abspath(self.output)}")
        if others := masks_of_others(self.output, [row["name"] for row in rows]):
            warn(
                f"{len(others)} masks there are of an earlier command, not in areas.csv,"
                f" such as MASK/{others[0]}"
            )

    def converse(self, ask: Callable[[str], str]) -> int:
        """Segment the files, folders or globs that the user types, until an empty line."""
        while True:
            try:
                answer = ask("radiograph (an empty line ends): ").strip()
            except EOFError:
                return 0
            if not answer:
                return 0
            try:
                for item in find_items(expand_path(answer.strip("'\"")), self.output):
                    image = self.predictor.read(item.path)
                    (finish,) = self.predictor.start([image])
                    written = self._write(partial(self._complete, item, image, finish))
                    print(describe(written.row, self.categories))
                    self._show(written.result)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


def predict(
    config: PredictConfig,
    averaging: AveragingConfig,
    exporting: ExportConfig,
    correcting: LabelNextConfig,
    arguments: Sequence[str],
) -> int:
    """The whole command.

    :param arguments: the positional arguments.
    :return: the exit code.
    """
    paths = paths_from_arguments(config, arguments)
    formats = parse_formats(exporting.export, "--export")
    if formats and (config.no_save or config.interactive):
        raise UserError(
            "--export writes files for many radiographs: leave out --no_save and --interactive"
        )
    _check_correcting(correcting, config)
    config = dataclasses.replace(config, model=paths.model)
    device = dist_util.open_device()
    predictor = averaging.on(device).load(paths.model, device)
    categories = predictor.categories
    if config.categories:
        categories = categories_for(len(categories), config.categories)
    if config.mask_threshold is not None and len(categories) != 2:
        raise UserError(
            f"--mask_threshold is for models of 2 classes; {paths.model} has {len(categories)}"
        )
    output = paths.outputs[0]
    if config.interactive:
        if not config.no_save:
            check_output(output, folder=True)
            run_lock.hold_folder(output, "choose another OUTPUT")
        return Job(predictor, config, categories, output, {}).converse(input)
    items = find_items(paths.inputs, output)
    files = _mask_files(items, paths.outputs, named=bool(config.output))
    if files and formats:
        raise UserError("--export needs a folder as OUTPUT, not a file for each mask")
    if files and correcting.label_next:
        raise UserError("--label_next needs a folder as OUTPUT, not a file for each mask")
    if not config.no_save:
        check_outputs(list(files.values()) or result_paths(output, items))
        if not files:
            _check_table(os.path.join(output, TABLE_NAME), categories)
    export, skip = None, config.skip_bad_images
    if formats:
        place, tolerance = os.path.join(output, EXPORT_FOLDER), exporting.tolerance
        export = Export(place, formats, items, categories, tolerance, skip_unreadable=skip)
    following = None
    if correcting.label_next:
        from guided_diffusion.segmentation.inference.label_next import LabelNext

        size = config.batch_size
        rest = (output, items, predictor, categories, size, skip)
        following = LabelNext(correcting, exporting, *rest)
    if not (files or config.no_save):
        run_lock.hold_folder(output, "choose another OUTPUT")
    return Job(predictor, config, categories, output, files, export, following).run(items)


def _check_table(path: str, categories: Sequence[Category]) -> None:
    """:raises UserError: if there is a class table of other classes."""
    if os.path.exists(path):
        remedy = "choose another OUTPUT, or remove the file if its masks are to be replaced"
        check_same_classes(load_categories(path), categories, (path, "the model"), remedy)


def _check_correcting(correcting: LabelNextConfig, config: PredictConfig) -> None:
    if correcting.label_next and (config.no_save or config.interactive):
        raise UserError(
            "--label_next chooses among the radiographs whose results are written: leave out"
            " --no_save and --interactive"
        )
    for name in ("labelled", "avoid", "group"):
        if getattr(correcting, name) and not correcting.label_next:
            raise UserError(f"--{name} needs --label_next, the number of radiographs to choose")


def _mask_files(items: Sequence[Item], outputs: Sequence[str], named: bool) -> dict[str, str]:
    """The masks' files where --output names files rather than a folder."""
    extensions = {os.path.splitext(output)[1].lower() for output in outputs}
    if not named or (len(outputs) == 1 and not extensions <= set(LOSSLESS_EXTENSIONS)):
        return {}
    if len(outputs) != len(items):
        raise UserError(
            f"--output names {len(outputs)} files for {len(items)} radiographs: give one folder, "
            "or one file per radiograph"
        )
    taken = {os.path.realpath(item.path): f"the radiograph {item.path}" for item in items}
    for item, output in zip(items, outputs):
        other = taken.setdefault(os.path.realpath(output), f"the mask of {item.path}")
        if other != f"the mask of {item.path}":
            raise UserError(f"--output {output} would overwrite {other}: name another file")
    return {item.name: output for item, output in zip(items, outputs)}
