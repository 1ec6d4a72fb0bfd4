"""Segment radiographs: masks, colours, overlays and areas, each at the radiograph's own size."""

import dataclasses
import os

import _path  # noqa: F401 - finds the package in a checkout that is not installed
from tqdm import tqdm

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError, command
from guided_diffusion.flags import flag, from_flags, given_flags, make_parser
from guided_diffusion.image_io import ImageError, check_header
from guided_diffusion.segmentation.categories import categories_for
from guided_diffusion.segmentation.predict import load_predictor
from guided_diffusion.segmentation.results import areas_row, find_items, write_areas, write_results
from guided_diffusion.segmentation.viewer import show


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Prediction."""

    categories: str = flag("", "class table, JSON, in place of the model's names and colours")
    save_probabilities: bool = flag(False, "also write PROBABILITIES/NAME.npz, float16 [C x H x W]")
    viz: bool = flag(False, "show each radiograph in a window")
    no_save: bool = flag(False, "write nothing", "-n")
    batch_size: int = flag(8, "radiographs a forward pass")
    skip_bad_images: bool = flag(False, "go on without files that cannot be read, listing them")


def main() -> int:
    parser = make_parser(__doc__, PredictConfig)
    parser.add_argument("model", help="file that finetune.py wrote, such as segm.pth")
    parser.add_argument("input", help="radiograph, folder or glob in quotes")
    parser.add_argument("output", nargs="?", default="results", help="folder for the results")
    given = given_flags(parser)
    settings = from_flags(PredictConfig, given)
    output = given["output"]
    predictor = load_predictor(given["model"], dist_util.dev())
    categories = predictor.categories
    if settings.categories:
        categories = categories_for(len(categories), settings.categories)
    items = find_items(given["input"], output)
    skipped: list[str] = []
    if not settings.skip_bad_images:
        for item in items:
            check_header(item.path)
    rows = []
    with tqdm(total=len(items), unit="image", dynamic_ncols=True) as bar:
        for first in range(0, len(items), settings.batch_size):
            batch, images = [], []
            for item in items[first : first + settings.batch_size]:
                try:
                    images.append(predictor.read(item.path))
                    batch.append(item)
                except ImageError as error:
                    if not settings.skip_bad_images:
                        raise
                    skipped.append(str(error))
                    bar.update()
            for item, image, probabilities in zip(batch, images, predictor.segment(images)):
                if settings.no_save:
                    mask = probabilities.argmax(axis=0).astype("uint8")
                else:
                    mask = write_results(
                        output, item, image, probabilities, categories, settings.save_probabilities
                    )
                rows.append(areas_row(item, mask, categories))
                bar.update()
                if settings.viz:
                    show(item.name, image, mask, categories)
    for line in skipped:
        print(f"skipped: {line}")
    if not rows:
        raise UserError(f"none of the {len(items)} files under {given['input']} can be read")
    if not settings.no_save:
        write_areas(output, rows)
        print(f"{len(rows)} radiographs segmented; results in {os.path.abspath(output)}")
    return 0


if __name__ == "__main__":
    command(main)()
