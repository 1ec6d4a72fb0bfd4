"""Whether one model, or one set of masks, is better than another."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import save_json, write_csv
from guided_diffusion.segmentation.categories import check_same_classes
from guided_diffusion.segmentation.evaluation.scoring import Evaluation, evaluate, without_nan
from guided_diffusion.segmentation.evaluation.sources import Source, is_model
from guided_diffusion.segmentation.evaluation.statistics import (
    FEWEST_PAIRS,
    SIGNIFICANCE,
    Difference,
    compare,
)
from guided_diffusion.segmentation.evaluation.tables import comparison_table, show, write_files
from guided_diffusion.segmentation.metrics import dice_iou

# the draws for the interval of the difference where --bootstrap is 0
_DRAWS = 2000
_SAME_CLASSES = "only predictions of the same classes can be compared"


def compare_two(source: Source, images: str) -> None:
    """Evaluate both sides of --compare; print the differences, and write them to --output.

    :param images: the radiographs; "" if both sides are masks.
    """
    config = source.config
    one, other = (_evaluate(source, place, images) for place in config.compare)
    tables, models = (one.categories, other.categories), [is_model(p) for p in config.compare]
    counts = [len(table) for table in tables]
    if all(models):
        check_same_classes(*tables, config.compare, _SAME_CLASSES)
    elif counts[0] != counts[1]:
        if config.categories or any(models):
            raise UserError(
                f"--compare: {config.compare[0]} has {counts[0]} classes and {config.compare[1]} "
                f"{counts[1]}: {_SAME_CLASSES}"
            )
        for result in (one, other):
            result.widen(max(counts))
    found = compare(
        [result.confusion for result in one.results],
        [result.confusion for result in other.results],
        [category.name for category in one.categories],
        config.bootstrap or _DRAWS,
        config.bootstrap_seed,
    )
    print(f"A: {config.compare[0]}\nB: {config.compare[1]}\n\n{comparison_table(found)}")
    print(verdict(found["mean"]))
    if config.output:
        _write(config.output, config.compare, (one, other), found)


def _evaluate(source: Source, place: str, images: str) -> Evaluation:
    if not is_model(place):
        pairs, categories = source.from_files(place)
    elif images:
        pairs, categories = source.from_model(place, images)
    else:
        raise UserError(f"--compare {place}: a model needs the arguments IMAGES TRUE_MASKS")
    return evaluate(pairs, categories, source.config.binary)


def verdict(mean: Difference | None) -> str:
    """The outcome of comparing the means, as a sentence."""
    if mean is None:
        return "no image has a foreground to compare"
    low, high = mean.interval
    found = (
        f"B - A = {mean.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f},"
        f" p = {mean.p_permutation:.2g}"
    )
    count = f"{mean.images} images" if mean.images > 1 else "1 image"
    if mean.images < FEWEST_PAIRS:
        return (
            f"{count} are too few to tell, at least {FEWEST_PAIRS} are needed: not significant,"
            f" {found}"
        )
    if mean.p_permutation >= SIGNIFICANCE or low <= 0 <= high:
        return f"no difference shown on {count}: not significant, {found}"
    better = "B" if mean.difference > 0 else "A"
    return f"{better} is better by {abs(mean.difference):.4f} on {count}: {found}"


def _write(
    folder: str,
    places: Sequence[str],
    results: tuple[Evaluation, Evaluation],
    found: Mapping[str, Difference | None],
) -> None:
    differences = {name: d and asdict(d) for name, d in found.items()}
    sides = {"first": places[0], "second": places[1]}
    plain = {**sides, "differences": differences, "verdict": verdict(found["mean"])}
    names = ("mean_dice", *(c.name for c in results[0].categories[1:]))
    header = ["name", *(f"{which}_{name}" for which in "AB" for name in names)]
    rows = []
    for pair in zip(*(result.results for result in results)):
        scores = [dice_iou(result.confusion) for result in pair]
        values = [v for s in scores for v in (s.mean_dice(), *s.dice[1:])]
        rows.append([pair[0].name, *(show(v, digits=6) for v in values)])
    write_files(
        folder,
        {
            "comparison.json": lambda path: save_json(path, without_nan(plain)),
            "comparison.csv": lambda path: write_csv(path, header, rows),
        },
    )
