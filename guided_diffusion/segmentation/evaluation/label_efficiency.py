"""Methods compared by the number of labelled images: runs, the command of each, and tables."""

import os
from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.runtime.storage import run_lock
from guided_diffusion.runtime.storage.files import check_output
from guided_diffusion.segmentation.evaluation.budgets import BudgetChooser
from guided_diffusion.segmentation.evaluation.config import LabelEfficiencyConfig
from guided_diffusion.segmentation.evaluation.efficiency_plan import Plan
from guided_diffusion.segmentation.evaluation.efficiency_work import run_all
from guided_diffusion.segmentation.evaluation.methods import parse_methods, parse_variants


def label_efficiency(
    settings: LabelEfficiencyConfig,
    train: tuple[str, str],
    test: tuple[str | None, str | None],
    methods: Sequence[str] = (),
    variants: Sequence[str] = (),
) -> int:
    """The whole command.

    :param train: folders of radiographs and masks to draw from.
    :param test: folders to evaluate on; both None with --folds.
    :param methods: definitions of methods, see `parse_methods`.
    :param variants: definitions of variants, see `parse_variants`.
    :return: the exit code.
    """
    images, masks = test
    if (images is None) != (masks is None):
        raise UserError("TEST_IMG is given without TEST_MASK: give both folders or --folds")
    held_out = (images, masks) if images is not None and masks is not None else None
    if settings.folds and not settings.steps:
        raise UserError("--folds needs --steps: budgets are chosen for an evaluation on TEST")
    dist_util.setup_dist()
    check_output(settings.output, folder=True)
    run_lock.hold_folder(settings.output, "choose another --output")
    compared, evaluations = parse_methods(settings.methods, methods), parse_variants(variants)
    plan = Plan(settings, compared, train, held_out, evaluations)
    budgets = ""
    stopped_by = None
    if not settings.steps:
        plan.check_flags()
        plan.check_foreground()
        chooser = BudgetChooser(settings, compared, train)
        choices = chooser.choose()
        stopped_by = chooser.stopped_by
        if not stopped_by:
            budgets = chooser.describe(choices)
            say(budgets)
            plan = plan.with_methods(
                [m if m.members else choices[m.name].budget.applied(m) for m in compared]
            )
    if not stopped_by:
        stopped_by = run_all(plan, budgets)
    if stopped_by:
        say(f"stopped by {stopped_by}: rerun the command to resume")
        return EXIT_STOPPED
    with open(os.path.join(settings.output, "table.md")) as file:
        print(file.read())
    return 0
