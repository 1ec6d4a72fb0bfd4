"""predict.py --label_next: a folder of the radiographs to correct next, for an annotation tool."""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guided_diffusion.images.duplicates import fingerprint
from guided_diffusion.images.groups import patients_of
from guided_diffusion.images.image_io import check_images
from guided_diffusion.images.left_out import LABEL_NEXT_FOLDER
from guided_diffusion.images.masks import read_mask
from guided_diffusion.images.names import ending
from guided_diffusion.images.splits import list_held_out, list_labelled
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage.files import (
    check_output,
    copy_file,
    is_local,
    save_json,
    write_csv,
    writing,
)
from guided_diffusion.segmentation.annotations.writing.config import ExportConfig, parse_formats
from guided_diffusion.segmentation.annotations.writing.export import Export
from guided_diffusion.segmentation.categories import TABLE_NAME, ClassTable, to_plain
from guided_diffusion.segmentation.inference.config import LabelNextConfig
from guided_diffusion.segmentation.inference.predictor import Segmenter
from guided_diffusion.segmentation.inference.results import Item, Result
from guided_diffusion.segmentation.inference.seen import look, see
from guided_diffusion.segmentation.selection.next_to_label import (
    Next,
    Seen,
    check_count,
    choose_next,
)
from guided_diffusion.segmentation.selection.picture import write_picture

# beside the final folder, as long as that is not complete
_PARTIAL = f".{LABEL_NEXT_FOLDER}.partial"
_DEFAULT_FORMATS = ("labelme",)
_COLUMNS = (
    *("rank", "file", "patient", "uncertainty", "uncertainty_rank", "of"),
    *("stands_for", "mean_distance", "distance_to_labelled"),
)


@dataclass(frozen=True)
class _Patients:
    """group: of each radiograph, by path. name: of each group, that of its first radiograph."""

    group: dict[str, int]
    name: dict[int, str]


class LabelNext:
    """Gathers what a command predicts, and writes OUTPUT/LABEL_NEXT at its end.

    :param output: the folder of the command's results.
    :param items: the radiographs that it predicts.
    :raises UserError: for whatever would stop it, before anything is written.
    """

    def __init__(
        self,
        config: LabelNextConfig,
        exporting: ExportConfig,
        output: str,
        items: Sequence[Item],
        predictor: Segmenter,
        categories: ClassTable,
        batch_size: int,
        skip_unreadable: bool,
    ):
        self.config, self.output, self.predictor = config, output, predictor
        self.categories, self.batch_size = categories, batch_size
        self.folder = os.path.join(output, LABEL_NEXT_FOLDER)
        if not is_local(output):
            raise UserError(f"--label_next needs a folder of this machine as OUTPUT, not {output}")
        if os.path.lexists(self.folder) and not _is_empty(self.folder):
            raise UserError(
                f"{self.folder} exists already and may hold corrections: choose another OUTPUT, or"
                " move it away"
            )
        check_output(os.path.join(output, _PARTIAL), folder=True)
        self.items = list(items)
        labelled = list_labelled(config.labelled) if config.labelled else []
        self.labelled = [Item(path, name) for name, path in labelled]
        held_out = list_held_out(config.labelled, config.avoid, "--labelled")
        self.avoided = [Item(path, name) for name, path in held_out]
        known = [*self.labelled, *self.avoided]
        self.patients = self._find_patients()
        used = {self.patients.group[item.path] for item in known}
        free = {self.patients.group[item.path] for item in self.items} - used
        check_count(config.label_next, len(free), bool(known))
        check_images([item.path for item in known])
        self.skip_unreadable = skip_unreadable
        self.formats = parse_formats(exporting.export, "--export") or _DEFAULT_FORMATS
        self.tolerance = exporting.tolerance
        self._export(self.folder, self.items)  # refuses what a format cannot hold
        self._seen: dict[str, Seen] = {}
        self._lock = threading.Lock()

    def add(self, result: Result) -> None:
        """Keep what the choice needs; threads may do so at once."""
        one = see(result.item, result.image, result.prediction)
        with self._lock:
            self._seen[result.item.path] = one

    def write(self) -> None:
        """Choose, and write the folder, which appears when it is complete.

        :raises UserError: if too few radiographs could be read.
        """
        seen = [self._seen[item.path] for item in self.items if item.path in self._seen]
        labelled = list(look(self.predictor, self.labelled, self.batch_size))
        avoided = {
            item.path: fingerprint(self.predictor.read(item.path)).digest for item in self.avoided
        }
        count, patients = self.config.label_next, self.patients.group
        choice = choose_next(seen, count, patients, labelled, avoided)
        self._remove_partial()
        try:
            with writing(self.folder):
                self._write(choice)
                os.rename(os.path.join(self.output, _PARTIAL), self.folder)
        except BaseException:
            self._remove_partial()
            raise
        print(
            f"{self.folder}: the {len(choice.chosen)} of {choice.considered} radiographs to correct"
            " next, in the order of label_next.csv"
        )

    def _export(self, folder: str, items: Sequence[Item]) -> Export:
        skip = self.skip_unreadable
        return Export(
            folder, self.formats, items, self.categories, self.tolerance, skip_unreadable=skip
        )

    def _write(self, choice: Next) -> None:
        partial = os.path.join(self.output, _PARTIAL)
        items = [Item(one.path, one.name) for one in choice.chosen]
        export = self._export(partial, items)
        for one, item in zip(choice.chosen, items):
            copy_file(one.path, os.path.join(partial, "IMG", _file(one)))
            mask = os.path.join(self.output, "MASK", f"{one.name}.png")
            export.add(item, read_mask(mask, len(self.categories)))
        export.close()
        save_json(os.path.join(partial, TABLE_NAME), to_plain(self.categories))
        paths = [one.path for one in (*choice.candidates, *choice.labelled)]
        notes = [f"{one.uncertainty:.3g}" for one in choice.chosen]
        picture = os.path.join(partial, "label_next.png")
        write_picture(picture, paths, choice.medoids, self.predictor.config.reading, notes)
        write_csv(os.path.join(partial, "label_next.csv"), _COLUMNS, self._rows(choice))

    def _rows(self, choice: Next) -> Iterator[tuple[object, ...]]:
        medoids = choice.medoids
        for place, (one, number) in enumerate(zip(choice.chosen, medoids.chosen)):
            distances = medoids.distance[medoids.nearest == place]
            to_labelled = "" if medoids.known is None else f"{medoids.known[number]:.4g}"
            yield (
                *(place + 1, _file(one), self.patients.name[self.patients.group[one.path]]),
                *(f"{one.uncertainty:.4f}", number + 1, choice.considered),
                *(len(distances), f"{distances.mean():.4g}", to_labelled),
            )

    def _find_patients(self) -> _Patients:
        films = [*self.items, *self.labelled, *self.avoided]
        names, paths = [film.name for film in films], [film.path for film in films]
        groups, said = patients_of(names, paths, self.config.group)
        if said:
            say(said)
        first = {group: names[group] for group in groups}
        return _Patients(dict(zip(paths, groups)), first)

    def _remove_partial(self) -> None:
        shutil.rmtree(os.path.join(self.output, _PARTIAL), ignore_errors=True)


def _file(one: Seen) -> str:
    return one.name + ending(one.path)


def _is_empty(folder: str) -> bool:
    return os.path.isdir(folder) and not os.listdir(folder)
