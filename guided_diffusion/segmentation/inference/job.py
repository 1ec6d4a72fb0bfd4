"""What scripts/predict.py does: radiographs to results, reading, network and writing overlapped."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from guided_diffusion import dist_util
from guided_diffusion.images.image_io import (
    LOSSLESS_EXTENSIONS,
    ImageError,
    check_header,
    write_mask,
)
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.runtime.signals import EXIT_STOPPED, StopRequest
from guided_diffusion.segmentation.categories import Category, categories_for
from guided_diffusion.segmentation.inference.predictor import Predictor, load_predictor
from guided_diffusion.segmentation.inference.results import (
    Item,
    areas_row,
    find_items,
    write_areas,
    write_results,
)
from guided_diffusion.segmentation.inference.uncertainty import next_to_label
from guided_diffusion.segmentation.inference.views import TTA
from guided_diffusion.segmentation.pipeline import in_batches, prefetch
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.visuals.report import Card, Report, make_card
from guided_diffusion.segmentation.visuals.viewer import show
from guided_diffusion.stepper import PRECISIONS


@dataclass(frozen=True)
class AveragingConfig:
    """Averaging several predictions"""

    TITLE = "Averaging several predictions"

    timesteps: str = flag("", "at which radiographs enter, such as 1,50,150; '': the model's own")
    tta: str = flag("none", "views to average over; flips exchange left and right", choices=TTA)
    flip_swap: str | None = flag(
        None, "classes that change places in a mirror, such as 1:2; absent: as trained", type=str
    )
    num_samples: int = flag(0, "masks that kind mask_diffusion draws; 0: the model's own number")
    steps: int = flag(0, "denoising steps of kind mask_diffusion; 0: the model's own number")
    sampler: str = flag("", "of kind mask_diffusion; '': the model's own")
    seed: int | None = flag(None, "of kind mask_diffusion's draws; absent: the model's", type=int)
    precision: str = flag("fp32", "of the network; fp16 on a GPU only", choices=tuple(PRECISIONS))
    compile: bool = flag(
        False, "compile the network, on GPUs to a CUDA graph: minutes at the start, then faster"
    )

    def load(self, model: str, device: Any = None) -> Predictor:
        """The predictor that a checkpoint, or several separated by commas, and the flags make."""
        drawing = {
            name: getattr(self, name)
            for name in ("num_samples", "steps", "sampler", "seed")
            if getattr(self, name) not in (0, "", None) or (name == "seed" and self.seed == 0)
        }
        return load_predictor(
            model,
            device,
            timesteps=parse_timesteps(self.timesteps),
            tta=self.tta,
            flip_swap=self.flip_swap,
            precision=self.precision,
            drawing=drawing,
            compile=self.compile,
        )


@dataclass(frozen=True)
class PredictConfig:
    """Prediction"""

    TITLE = "Prediction"

    model: str = flag("", "the same as the argument MODEL", "-m")
    input: tuple[str, ...] = flag((), "the same as INPUT; several", "-i", type=str, nargs="+")
    output: tuple[str, ...] = flag(
        (),
        "the same as OUTPUT; or a mask's file name for each radiograph",
        "-o",
        type=str,
        nargs="+",
    )
    categories: str = flag("", "class table, JSON, in place of the model's names and colours")
    save_probabilities: bool = flag(False, "also write PROBABILITIES/NAME.npz, float16 [C x H x W]")
    save_uncertainty: bool = flag(False, "also write UNCERTAINTY/NAME.png, and .npz with float16")
    mask_threshold: float | None = flag(
        None, "two classes: probability above which a pixel is foreground", "-t", type=float
    )
    viz: bool = flag(False, "show each radiograph in a window", "-v")
    no_save: bool = flag(False, "write nothing", "-n")
    batch_size: int = flag(8, "radiographs a forward pass")
    skip_bad_images: bool = flag(False, "go on without files that cannot be read, listing them")
    report: bool = flag(True, "also write report.html, to look through the results in a browser")
    interactive: bool = flag(False, "ask for paths, one a line, until an empty line")


def parse_timesteps(text: str) -> tuple[float, ...]:
    """`"1,50,150"` to numbers."""
    try:
        timesteps = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        timesteps = (-1.0,)
    if not all(0 <= timestep < float("inf") for timestep in timesteps):
        raise UserError(f"--timesteps {text}: expected numbers from 0 on, such as 1,50,150")
    return timesteps


def resolve_places(
    config: PredictConfig, arguments: Sequence[str]
) -> tuple[str, list[str], list[str]]:
    """(model, inputs, outputs) of the flags, the rest of them from positional arguments.

    :param arguments: what stood on the command line without a flag: MODEL, INPUT and OUTPUT, less
        those that flags name.
    """
    rest = list(arguments)
    model = config.model or (rest.pop(0) if rest else "")
    takes_input = not config.interactive
    inputs = list(config.input) or ([rest.pop(0)] if rest and takes_input else [])
    outputs = list(config.output) or ([rest.pop(0)] if rest else ["results"])
    if rest:
        raise UserError(
            f"{rest[0]!r} is one argument too many: MODEL INPUT OUTPUT, or flags (several files "
            "after --input); put a glob in quotes"
        )
    if not model:
        raise UserError("the following arguments are required: model, input (see --help)")
    if not inputs and takes_input:
        raise UserError("the following arguments are required: input (see --help)")
    if inputs and not takes_input:
        raise UserError("--interactive asks for the radiographs: leave out --input")
    return model, inputs, outputs


@dataclass
class Job:
    """A predictor and what is done with its predictions.

    :param files: a mask's file for each radiograph's name, in place of a folder of results.
    """

    predictor: Predictor
    config: PredictConfig
    categories: tuple[Category, ...]
    output: str
    files: Mapping[str, str]

    def run(self, items: Sequence[Item]) -> int:
        """Segment all; returns the exit code."""
        if not self.config.skip_bad_images:
            for item in items:
                check_header(item.path)
        rows: list[dict[str, object]] = []
        skipped: list[str] = []
        orders = (("uncertainty", True), ("name", False))
        report = Report("Segmented radiographs", self.categories, orders, ("area %",))
        with (
            StopRequest() as stop,
            tqdm(total=len(items), unit="image", dynamic_ncols=True) as bar,
        ):
            found = self._predictions(items, skipped, bar, stop)
            for item, image, mask, row, card in prefetch(self._write, found, ahead=3):
                rows.append(row)
                if card:
                    report.add(card)
                bar.update()
                if self.config.viz:
                    show(item.name, image, mask, self.categories)
        for line in skipped:
            print(f"skipped: {line}")
        if not rows and not stop.requested:
            raise UserError(f"none of the {len(items)} files can be read; see the lines above")
        if rows:
            self._close(rows, report)
        if stop.requested:
            print(f"stopped by {stop.requested} after {len(rows)} of {len(items)} radiographs")
            return EXIT_STOPPED
        return 0

    def _predictions(
        self, items: Sequence[Item], skipped: list[str], bar: tqdm, stop: StopRequest
    ) -> Iterator[tuple[Item, np.ndarray, Callable[[], Prediction]]]:
        size = self.config.batch_size
        read = prefetch(self._read, items, ahead=size)
        for batch in in_batches(read, size):
            if stop.requested:
                return
            good = [(item, image) for item, image in batch if not isinstance(image, ImageError)]
            for _, error in batch:
                if isinstance(error, ImageError):
                    if not self.config.skip_bad_images:
                        raise error
                    skipped.append(str(error))
                    bar.update()
            started = self.predictor.start([image for _, image in good])
            for (item, image), finish in zip(good, started):
                yield item, image, finish

    def _read(self, item: Item) -> tuple[Item, np.ndarray | ImageError]:
        try:
            return item, self.predictor.read(item.path)
        except ImageError as error:
            return item, error

    def _write(
        self, found: tuple[Item, np.ndarray, Callable[[], Prediction]]
    ) -> tuple[Item, np.ndarray | None, np.ndarray, dict[str, object], Card | None]:
        item, image, finish = found
        prediction = finish()
        mask = prediction.mask(self.config.mask_threshold)
        if self.files and not self.config.no_save:
            write_mask(self.files[item.name], mask)
        elif not self.config.no_save:
            write_results(
                self.output,
                item,
                image,
                mask,
                prediction,
                self.categories,
                self.config.save_probabilities,
                self.config.save_uncertainty,
            )
        row = areas_row(item, mask, prediction, self.categories)
        card = None
        if self._reporting:
            card = prediction_card(row, image, mask, prediction, self.categories)
        return item, image if self.config.viz else None, mask, row, card

    @property
    def _reporting(self) -> bool:
        return self.config.report and not (
            self.config.no_save or self.files or self.config.interactive
        )

    def _close(self, rows: Sequence[dict[str, object]], report: Report) -> None:
        if len(rows) > 1:
            scores = {str(row["name"]): float(row["uncertainty"]) for row in rows}
            name = next_to_label(scores)
            print(f"to label next: {name}, the least certain (uncertainty {scores[name]:.4f})")
        if self.config.no_save:
            return
        if self.files:
            print(f"{len(rows)} masks written")
            return
        write_areas(self.output, rows)
        if self._reporting:
            facts = (("radiographs", len(rows)), ("model", self.config.model))
            report.write(os.path.join(self.output, "report.html"), facts)
        print(f"{len(rows)} radiographs segmented; results in {os.path.abspath(self.output)}")

    def converse(self, ask: Callable[[str], str]) -> int:
        """Segment what the user names, a file, folder or glob a line, until an empty line."""
        while True:
            try:
                answer = ask("radiograph (an empty line ends): ").strip()
            except EOFError:
                return 0
            if not answer:
                return 0
            try:
                for item in find_items(os.path.expanduser(answer.strip("'\"")), self.output):
                    image = self.predictor.read(item.path)
                    started = self.predictor.start([image])[0]
                    _, image, mask, row, _ = self._write((item, image, started))
                    print(describe(row, self.categories))
                    if self.config.viz:
                        show(item.name, image, mask, self.categories)
            except UserError as error:
                print(f"error: {error}")


def prediction_card(
    row: Mapping[str, Any],
    image: np.ndarray,
    mask: np.ndarray,
    prediction: Prediction,
    categories: Sequence[Category],
    **options: Any,
) -> Card:
    """A prediction in the report, with the figures of its line in areas.csv."""
    scores = {name: row[name] for name in ("uncertainty", "disagreement") if name in row}
    areas = {c.index: [100 * row[f"{c.name} share"]] for c in categories[1:]}
    return make_card(
        row["name"],
        image,
        mask,
        scores,
        areas,
        urgency=row["uncertainty"],
        prediction=prediction,
        **options,
    )


def describe(row: Mapping[str, object], categories: Sequence[Category]) -> str:
    """One radiograph's areas on a line."""
    shares = [f"{c.name} {100 * row[f'{c.name} share']:.1f} %" for c in categories[1:]]
    return f"{row['name']}: {', '.join(shares)}; uncertainty {row['uncertainty']:.4f}"


def predict(config: PredictConfig, averaging: AveragingConfig, places: Sequence[str]) -> int:
    """The whole command.

    :param places: the arguments without flags.
    :return: the exit code.
    """
    model, inputs, outputs = resolve_places(config, places)
    if config.batch_size < 1:
        raise UserError(f"--batch_size {config.batch_size} must be at least 1")
    predictor = averaging.load(model, dist_util.dev())
    categories = predictor.categories
    if config.categories:
        categories = categories_for(len(categories), config.categories)
    if config.mask_threshold is not None:
        if len(categories) != 2:
            raise UserError(
                f"--mask_threshold is for models of 2 classes; {model} has {len(categories)}"
            )
        if not 0 <= config.mask_threshold <= 1:
            raise UserError(f"--mask_threshold {config.mask_threshold} must be from 0 to 1")
    if config.interactive:
        return Job(predictor, config, categories, outputs[0], {}).converse(input)
    config = dataclasses.replace(config, model=model)
    items = find_items(inputs, outputs[0])
    files = _mask_files(items, outputs, named=bool(config.output))
    return Job(predictor, config, categories, outputs[0], files).run(items)


def _mask_files(items: Sequence[Item], outputs: Sequence[str], named: bool) -> dict[str, str]:
    """The masks' files where --output names files rather than a folder."""
    endings = {os.path.splitext(output)[1].lower() for output in outputs}
    if not named or (len(outputs) == 1 and not endings <= set(LOSSLESS_EXTENSIONS)):
        return {}
    if len(outputs) != len(items):
        raise UserError(
            f"--output names {len(outputs)} files for {len(items)} radiographs: give a folder, or "
            "a file each"
        )
    return {item.name: output for item, output in zip(items, outputs)}
