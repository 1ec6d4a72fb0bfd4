"""Which radiographs to label: choosing them, and the folder in which they are handed over."""

import os
import shutil
from collections.abc import Iterator, Sequence

from guided_diffusion import dist_util
from guided_diffusion.images.files import list_radiographs, name_images
from guided_diffusion.images.groups import patients_of
from guided_diffusion.images.image_io import check_images
from guided_diffusion.images.names import ending
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.preparation.config import PrepareConfig
from guided_diffusion.preparation.layouts import require_new_folder
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.storage import contents, run_lock
from guided_diffusion.runtime.storage.files import (
    check_output,
    copy_file,
    read_json,
    save_json,
    write_csv,
)
from guided_diffusion.segmentation.selection.choose import check_patients, choose
from guided_diffusion.segmentation.selection.features import Encoder
from guided_diffusion.segmentation.selection.medoids import Medoids
from guided_diffusion.segmentation.selection.picture import write_picture
from guided_diffusion.segmentation.selection.pool import read_pool

# in the output folder, as long as the selection is not complete
_PARTIAL = ".partial"
_COLUMNS = (
    *("rank", "file", "patient", "stands_for"),
    *("mean_distance", "largest_distance", "mean_distance_so_far"),
)


def select(config: PrepareConfig) -> int:
    """Choose --k radiographs of --image-dir, and copy them to --output-dir.

    :return: the exit code.
    :raises UserError: for whatever the user must correct.
    """
    if not config.image_dir or not os.path.isdir(config.image_dir):
        raise UserError(f"--image-dir {config.image_dir or 'is missing'}: a folder of radiographs")
    if not config.checkpoint:
        raise UserError("--checkpoint is missing: name the pretrained network")
    output = config.output_dir
    partial = os.path.join(output, _PARTIAL)
    if not (output and os.path.isdir(partial)):
        require_new_folder(output, config.image_dir)
    encoder = Encoder(read_trained(config.checkpoint, {}), dist_util.open_device())
    paths, note = list_radiographs(config.image_dir)
    names = name_images(config.image_dir, paths)
    patients, said = patients_of(names, paths, config.group)
    for line in filter(None, (note and f"{config.image_dir}: {note}", said, encoder.note)):
        say(line)
    check_patients(config.k, len(set(patients)))
    if not config.skip_bad_images:
        check_images(paths)
    _begin(output, config, paths)
    pool = read_pool(paths, encoder, partial, config.skip_bad_images)
    for line in pool.notes:
        say(line)
    if not pool.paths:
        raise UserError(f"none of the {len(paths)} files can be read; see the lines above")
    medoids = choose(pool, config.k, dict(zip(paths, patients)))
    chosen = [paths.index(pool.paths[place]) for place in medoids.chosen]
    files = [names[number] + ending(paths[number]) for number in chosen]
    shutil.rmtree(os.path.join(output, "IMG"), ignore_errors=True)  # of a command that was killed
    for number, file in zip(chosen, files):
        copy_file(paths[number], os.path.join(output, "IMG", file))
    picture = os.path.join(output, "selection.png")
    write_picture(picture, pool.paths, medoids, encoder.reading)
    rows = _rows(files, [names[patients[number]] for number in chosen], medoids)
    write_csv(os.path.join(output, "selection.csv"), _COLUMNS, rows)
    shutil.rmtree(partial)
    print(
        f"{output}/IMG: {config.k} of {len(pool.paths)} radiographs to label, in the order of"
        " selection.csv; selection.png shows what each stands for"
    )
    return 0


def _begin(output: str, config: PrepareConfig, paths: Sequence[str]) -> None:
    """Lock the output folder, and begin to compute vectors in it, or go on where one was killed."""
    check_output(output, folder=True)
    run_lock.hold_folder(output, "choose another --output-dir")
    path = os.path.join(output, _PARTIAL, "origin.json")
    if not os.path.exists(path) and set(os.listdir(output)) - {run_lock.LOCK_NAME, _PARTIAL}:
        raise UserError(f"--output-dir {output} holds a finished selection: name a new folder")
    origin = {
        "checkpoint": contents.digest(config.checkpoint),
        "names": contents.combined([f"{n} {path}" for n, path in enumerate(paths)]),
        "images": contents.summary([[path] for path in paths]),
    }
    if os.path.exists(path) and (before := read_json(path)) != origin:
        changed = [name for name in origin if before.get(name) != origin[name]]
        raise UserError(
            f"--output-dir {output} holds the beginning of another selection (other"
            f" {', '.join(changed)}): name a new folder, or remove that one"
        )
    save_json(path, origin)


def _rows(
    files: Sequence[str], patients: Sequence[str], medoids: Medoids
) -> Iterator[tuple[object, ...]]:
    """The lines of selection.csv.

    :param files: the chosen radiographs. patients: of each, the name of the patient's first one.
    """
    for place, (file, patient) in enumerate(zip(files, patients)):
        distances = medoids.distance[medoids.nearest == place]
        figures = (distances.mean(), distances.max(), medoids.reached[place])
        yield (
            *(place + 1, file, patient, len(distances)),
            *(f"{figure:.4g}" for figure in figures),
        )
