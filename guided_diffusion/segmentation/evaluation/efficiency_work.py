"""Making the runs of a comparison: train, evaluate, keep the figures."""

import contextlib
import functools
import io
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import torch as th
from tqdm import tqdm

from guided_diffusion import dist_util, logger
from guided_diffusion.runtime import run_lock
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.files import save_json, writing
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.workers import Outcome, side_by_side
from guided_diffusion.segmentation.evaluation.draws import Pairs
from guided_diffusion.segmentation.evaluation.efficiency_plan import Plan, Run
from guided_diffusion.segmentation.evaluation.efficiency_tables import (
    RESULT_NAME,
    Figures,
    RunResult,
    read_result,
    read_results,
    score_text,
    write_tables,
)
from guided_diffusion.segmentation.evaluation.mask_pairs import predict_mask_pairs
from guided_diffusion.segmentation.evaluation.methods import RUNNERS
from guided_diffusion.segmentation.evaluation.scoring import evaluate
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.metrics import dice_iou
from guided_diffusion.segmentation.training.learning import LearningConfig

# runs at a time that --jobs 0 chooses at most: each holds a network, its gradients and torch
_MOST_JOBS = 4


def run_all(plan: Plan, budgets: str = "") -> str | None:
    """Do the runs that are not finished, and write the tables; returns the signal that stopped it.

    :param budgets: how those of the methods were chosen, for table.md.
    """
    plan.check_all()
    stopped_by = _make(plan, lambda: _write_tables(plan, budgets, picture=False))
    _write_tables(plan, budgets)
    return stopped_by


def _make(plan: Plan, after_each: Callable[[], None]) -> str | None:
    todo = [run for run in plan.runs if read_result(plan.folder(run)) is None]
    with progress_bar(len(plan.runs), unit="run", initial=len(plan.runs) - len(todo)) as bar:

        def report(run: Run, outcome: Outcome) -> None:
            if not outcome.stopped_by:
                tqdm.write(outcome.message)
                bar.update()
                after_each()

        jobs = min(len(todo), plan.settings.jobs or _parallel_runs())
        if jobs > 1:
            tqdm.write(f"{jobs} runs at a time")
            work = functools.partial(train_and_evaluate, plan)
            return side_by_side(work, todo, jobs, functools.partial(_share_cores, jobs), report)
        for run in todo:
            bar.set_description(run.name)
            outcome = train_and_evaluate(plan, run)
            report(run, outcome)
            if outcome.stopped_by:
                return outcome.stopped_by
    return None


def _write_tables(plan: Plan, budgets: str, picture: bool = True) -> None:
    """Write the tables of all runs in the output folder, with those of this command first."""
    order = [
        method.name + suffix
        for method in plan.methods
        for suffix in ("", *(f"+{name}" for name in plan.variants))
    ]
    names = [category.name for category in plan.categories]
    results = read_results(plan.settings.output)
    write_tables(plan.settings.output, results, order, names, picture, budgets)


def _parallel_runs() -> int:
    """How many runs at a time suit this machine: on a GPU one, which has it for itself."""
    return 1 if dist_util.dev().type == "cuda" else min(_MOST_JOBS, dist_util.cores())


def _share_cores(jobs: int) -> None:
    """Leave the other processes their cores."""
    th.set_num_threads(max(1, min(th.get_num_threads(), dist_util.cores() // jobs)))


def train_and_evaluate(plan: Plan, run: Run) -> Outcome:
    """Make a run and leave its figures in its folder."""
    began = time.monotonic()
    _, module = RUNNERS[run.method.script]
    prepare = import_module(module).prepare
    with writing(plan.folder(run)):
        os.makedirs(plan.folder(run), exist_ok=True)
    # its messages are in its log.txt
    with contextlib.redirect_stdout(io.StringIO()), run_lock.released():
        finetuner = prepare(plan.parse_arguments(run))
        if finetuner is not None:
            finetuner.run()
        logger.reset()
    if finetuner is not None and finetuner.stopped_by:
        return Outcome(finetuner.stopped_by)
    trained = time.monotonic()
    path, commands, test = plan.model_path(run), plan.commands(run), plan.tests[run.fold or 0]
    result: RunResult = {
        "method": run.method.name,
        "k": run.k,
        "seed": run.seed,
        "fold": run.fold,
        **_scores(plan, path, test, ()),
        "variants": {},
        "seconds": round(trained - began, 1),
        "images": plan.images_of(run),
        "commands": commands,
        "origin": plan.origin(run),
    }
    if plan.precision:
        result["precision"] = plan.precision[1]
    messages = []
    for (name, flags), command in zip(plan.variants.items(), commands[2:]):
        try:
            result["variants"][name] = {**_scores(plan, path, test, flags), "command": command}
        except UserError as error:  # not every kind of network has every option
            messages.append(f"{run.name} without {name}: {error}")
    save_json(os.path.join(plan.folder(run), RESULT_NAME), result)
    os.remove(finetuner.last_path if finetuner else path.replace(".pth", "_last.pth"))
    if not plan.settings.keep_models:
        os.remove(path)
        shutil.rmtree(LearningConfig(weights_save=path).stages_folder, ignore_errors=True)
    dice = score_text(result["mean_dice"])
    messages.append(f"{run.name}: mean Dice {dice}, {time.monotonic() - began:.0f} s")
    if th.cuda.is_available():
        th.cuda.empty_cache()
    return Outcome(message="\n".join(messages))


def _scores(plan: Plan, path: str, test: Pairs, flags: Sequence[str]) -> Figures:
    """Scores of a model over all test images, each at its own size.

    :param flags: of evaluate.py.
    """
    averaging = parse_flags(make_parser("", AveragingConfig), [*plan.precision, *flags])
    predictor = from_flags(AveragingConfig, averaging).load(path, dist_util.dev())
    binary = plan.settings.binary
    rule = plan.categories.mask_rule(binary)
    pairs = predict_mask_pairs(predictor, test.images, test.masks, rule)
    scores = dice_iou(evaluate(pairs, plan.categories, binary).confusion)
    names = [category.name for category in plan.categories]
    return {
        "mean_dice": _plain(scores.mean_dice()),
        "mean_iou": _plain(scores.mean_iou()),
        "dice": dict(zip(names, map(_plain, scores.dice))),
        "iou": dict(zip(names, map(_plain, scores.iou))),
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
