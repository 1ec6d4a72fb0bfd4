"""The loop of predicting, correcting and learning again, played with masks that are known."""

import os

from guided_diffusion import dist_util
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.signals import EXIT_STOPPED, StopRequest
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.storage.files import check_output, save_json
from guided_diffusion.runtime.workers import Outcome
from guided_diffusion.segmentation.evaluation.config import LoopConfig
from guided_diffusion.segmentation.evaluation.efficiency_plan import Run
from guided_diffusion.segmentation.evaluation.efficiency_tables import (
    RESULT_NAME,
    read_results,
    score_text,
)
from guided_diffusion.segmentation.evaluation.efficiency_work import (
    clean_up,
    make_run,
    run_all,
    wait_for,
)
from guided_diffusion.segmentation.evaluation.loop_plan import UNCERTAIN, LoopPlan
from guided_diffusion.segmentation.inference.averaging import AveragingConfig
from guided_diffusion.segmentation.inference.results import Item
from guided_diffusion.segmentation.inference.seen import look
from guided_diffusion.segmentation.selection.next_to_label import choose_next, least_certain

# radiographs per forward pass
_BATCH = 8


def simulate_loop(config: LoopConfig, train: tuple[str, str], val: tuple[str, str]) -> int:
    """The whole command.

    :param train: folders of the radiographs to choose among and of their masks.
    :param val: folders to evaluate on.
    :return: the exit code.
    """
    dist_util.setup_dist()
    check_output(config.output, folder=True)
    run_lock.hold_folder(config.output, "choose another --output")
    plan = LoopPlan(config, train, val)
    stopped_by = run_all(plan, make=make_round)
    plan.table(read_results(config.output)).write(config.output)
    if stopped_by:
        say(f"stopped by {stopped_by}: rerun the command to resume")
        return EXIT_STOPPED
    with open(os.path.join(config.output, "table.md")) as file:
        print(file.read())
    return 0


def make_round(plan: LoopPlan, run: Run) -> Outcome:
    """Choose the images that a run adds, and train and evaluate with them."""
    if plan.repeats_start(run):
        return _repeat_start(plan, run)
    previous = plan.previous(run)
    if previous and not plan.is_chosen(run):
        if stopped_by := wait_for(plan, [previous]):
            return Outcome(stopped_by)
        with StopRequest() as stop:
            chosen = choose(plan, run, previous)
        if stop.requested:
            return Outcome(stop.requested)
        save_json(plan.choice_path(run), {"images": chosen})
        clean_up(plan, previous)
    return make_run(plan, run)


def choose(plan: LoopPlan, run: Run, previous: Run) -> list[str]:
    """Names of the images that a run adds, by the network of the one before; no mask is read."""
    labelled = set(plan.images_of(previous))
    flags = parse_flags(make_parser("", AveragingConfig), plan.precision)
    predictor = from_flags(AveragingConfig, flags).load(plan.model_path(previous), dist_util.dev())
    items = [Item(path, name) for name, path in plan.films]
    seen = list(look(predictor, items, _BATCH))
    known = [one for one in seen if one.name in labelled]
    rest = [one for one in seen if one.name not in labelled]
    count = run.k - previous.k
    if run.method.name == UNCERTAIN:
        return [one.name for one in least_certain(rest, count, plan.patients, known)]
    return [one.name for one in choose_next(rest, count, plan.patients, known).chosen]


def _repeat_start(plan: LoopPlan, run: Run) -> Outcome:
    """Leave the figures of another rule's run that began with the same images."""
    start = plan.start(run)
    if stopped_by := wait_for(plan, [start]):
        return Outcome(stopped_by)
    result = plan.result(start)
    assert result is not None
    own = {**result, "method": run.method.name, "commands": plan.commands(run), "kept": False}
    save_json(os.path.join(plan.folder(run), RESULT_NAME), own)
    return Outcome(message=f"{run.name}: mean Dice {score_text(result['mean_dice'])}, as {start}")
