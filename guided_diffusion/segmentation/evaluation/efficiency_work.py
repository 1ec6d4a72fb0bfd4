"""Making the runs of a comparison: train, evaluate, keep the figures."""

import contextlib
import functools
import io
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from typing import Any

import torch as th

from guided_diffusion import dist_util, logger
from guided_diffusion.runtime import session
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.signals import StopRequest
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.storage.files import remove_file, save_json, writing
from guided_diffusion.runtime.workers import Outcome, side_by_side
from guided_diffusion.segmentation.evaluation.draws import Pairs
from guided_diffusion.segmentation.evaluation.efficiency_plan import Plan, Run
from guided_diffusion.segmentation.evaluation.efficiency_tables import (
    RESULT_NAME,
    Figures,
    RunResult,
    read_results,
    score_text,
    write_tables,
)
from guided_diffusion.segmentation.evaluation.mask_pairs import predict_mask_pairs
from guided_diffusion.segmentation.evaluation.methods import RUNNERS
from guided_diffusion.segmentation.evaluation.scoring import evaluate
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.metrics import dice_iou
from guided_diffusion.segmentation.model_file import load_model, save_model
from guided_diffusion.segmentation.networks.union import join
from guided_diffusion.segmentation.training.learning import LearningConfig

# seconds between looks at the runs of other processes
_LOOK_EVERY = 0.5
# runs at a time that --jobs 0 chooses at most: each holds a network, its gradients and torch
_MOST_JOBS = 4


def run_all(
    plan: Plan, budgets: str = "", make: Callable[[Any, Run], Outcome] | None = None
) -> str | None:
    """Do the runs that are not finished, and write the tables; returns the signal that stopped it.

    :param budgets: how those of the methods were chosen, for table.md.
    :param make: makes a run of the plan; by default `make_run`. It is pickled.
    """
    plan.check_all()
    work = functools.partial(make or make_run, plan)
    stopped_by = _make(plan, work, lambda: _write_tables(plan, budgets, picture=False))
    _write_tables(plan, budgets)
    return stopped_by


def _make(plan: Plan, work: Callable[[Run], Outcome], after_each: Callable[[], None]) -> str | None:
    todo = _todo(plan)
    done = max(0, len(plan.runs) - len(todo))
    with progress_bar(done + len(todo), unit="run", initial=done) as bar:

        def report(run: Run, outcome: Outcome) -> None:
            if not outcome.stopped_by:
                say(outcome.message)
                bar.update()
                after_each()

        jobs = min(len(todo), plan.settings.jobs or _parallel_runs())
        if jobs > 1:
            say(f"{jobs} runs at a time")
            return side_by_side(work, todo, jobs, functools.partial(_share_cores, jobs), report)
        for run in todo:
            bar.set_description(run.name, refresh=False)
            outcome = work(run)
            report(run, outcome)
            if outcome.stopped_by:
                return outcome.stopped_by
    return None


def _todo(plan: Plan) -> list[Run]:
    """The runs that have not finished, and those whose network a union lacks.

    A union comes after its members and the trainings that follow them, so that it hardly waits.
    """
    needed = plan.needed()
    todo: list[Run] = []
    late: list[Run] = []
    for _, runs in itertools.groupby(plan.runs, lambda run: (run.seed, run.fold, run.k)):
        unions = late
        late = []
        for run in runs:
            if run.method.members:
                late += [] if plan.finished(run) else [run]
            elif _is_awaited(plan, run, needed):
                todo.append(run)
        todo += unions
    return todo + late


def _write_tables(plan: Plan, budgets: str, picture: bool = True) -> None:
    """Write the tables of all runs in the output folder, with those of this command first."""
    order = [
        method.name + suffix
        for method in plan.methods
        for suffix in ("", *(f"+{name}" for name in plan.variants))
    ]
    names = [category.name for category in plan.categories]
    results = read_results(plan.settings.output)
    below = budgets + plan.remarks(results)
    write_tables(plan.settings.output, results, order, names, picture, below)


def _parallel_runs() -> int:
    """How many runs at a time suit this machine: on a GPU one, which has it for itself."""
    return 1 if dist_util.dev().type != "cpu" else min(_MOST_JOBS, dist_util.cores())


def _share_cores(jobs: int) -> None:
    """Leave the other processes their cores."""
    th.set_num_threads(max(1, min(th.get_num_threads(), dist_util.cores() // jobs)))


def _is_awaited(plan: Plan, run: Run, needed: Collection[Run]) -> bool:
    """Whether a run has not finished, or lacks the network that others need."""
    return not plan.finished(run) or (run in needed and not os.path.exists(plan.model_path(run)))


def make_run(plan: Plan, run: Run) -> Outcome:
    """Train and evaluate, or evaluate a union, and leave the figures in the run's folder."""
    began = time.monotonic()
    with writing(plan.folder(run)):
        os.makedirs(plan.folder(run), exist_ok=True)
    stopped_by = _join(plan, run) if run.method.members else _train(plan, run)
    if stopped_by:
        return Outcome(stopped_by)
    seconds = time.monotonic() - began
    if run.method.members:
        found = [plan.result(member) for member in plan.members(run)]
        seconds = sum(result["seconds"] for result in found if result)
    messages = _evaluate(plan, run, seconds)
    for done in [*plan.members(run), run]:
        clean_up(plan, done)
    if th.cuda.is_available():
        th.cuda.empty_cache()
    messages[0] += f", {time.monotonic() - began:.0f} s"
    return Outcome(message="\n".join(messages))


def _train(plan: Plan, run: Run) -> str | None:
    """Leave the network of a run; returns the signal that stopped it."""
    _, module = RUNNERS[run.method.script]
    # its messages are in its log.txt
    with (
        contextlib.redirect_stdout(io.StringIO()),
        session.changed(silent=True),
        run_lock.released(),
    ):
        finetuner = import_module(module).prepare(plan.parse_arguments(run))
        if finetuner is not None:
            finetuner.run()
        logger.reset()
    return finetuner.stopped_by if finetuner is not None else None


def _join(plan: Plan, run: Run) -> str | None:
    """Leave the network of a union; returns the signal that stopped it."""
    members = plan.members(run)
    if stopped_by := wait_for(plan, members):
        return stopped_by
    loaded = [load_model(plan.model_path(member)) for member in members]
    config, weights = join([(config, model.state_dict()) for model, config, _ in loaded])
    save_model(plan.model_path(run), config, weights)
    return None


def wait_for(plan: Plan, runs: Sequence[Run]) -> str | None:
    """Until other processes have made them; returns the signal that stopped it."""

    def unmade() -> bool:
        needed = plan.needed()
        return any(_is_awaited(plan, run, needed) for run in runs)

    with StopRequest() as stop:
        while unmade():
            if stop.requested:
                return stop.requested
            time.sleep(_LOOK_EVERY)
    return None


def _evaluate(plan: Plan, run: Run, seconds: float) -> list[str]:
    """Leave the figures of a run; returns what to tell the user."""
    path, commands, test = plan.model_path(run), plan.commands(run), plan.tests[run.fold or 0]
    result: RunResult = {
        "method": run.method.name,
        "k": run.k,
        "seed": run.seed,
        "fold": run.fold,
        **_scores(plan, path, test, ()),
        "variants": {},
        "seconds": round(seconds, 1),
        "images": plan.images_of(run),
        "commands": commands,
        "origin": plan.origin(run),
        "kept": plan.settings.keep_models,
    }
    if plan.precision:
        result["precision"] = plan.precision[1]
    messages = [f"{run.name}: mean Dice {score_text(result['mean_dice'])}"]
    for (name, flags), command in zip(plan.variants.items(), commands[2:]):
        try:
            result["variants"][name] = {**_scores(plan, path, test, flags), "command": command}
        except UserError as error:  # not every kind of network has every option
            messages.append(f"{run.name} without {name}: {error}")
    save_json(os.path.join(plan.folder(run), RESULT_NAME), result)
    return messages


def clean_up(plan: Plan, run: Run) -> None:
    """Remove what a finished training needs no more; its network once all others have used it."""
    settings = LearningConfig(weights_save=plan.model_path(run))
    remove_file(settings.last_path)
    if (result := plan.result(run)) is None or result.get("kept", True):
        return
    if run in plan.needed():
        return
    remove_file(settings.weights_save)
    shutil.rmtree(settings.stages_folder, ignore_errors=True)


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
