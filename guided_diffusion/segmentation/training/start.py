"""Beginning or resuming a training: of one network, or in stages."""

from collections.abc import Mapping

from guided_diffusion.segmentation.inference.predictor import check_agreement
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.segmentation.training.dataset import TrainingData
from guided_diffusion.segmentation.training.job import (
    TrainingRun,
    is_complete,
    origin_of,
    start_run,
)
from guided_diffusion.segmentation.training.partner import Partner, PartnerRun, partner_files
from guided_diffusion.segmentation.training.resume import (
    load_finished,
    load_interrupted,
    split_paths,
)
from guided_diffusion.segmentation.training.self_training import SelfTraining
from guided_diffusion.segmentation.training.stages import Build, Settings


def start(
    build: Build[Settings],
    settings: Settings,
    data: TrainingData,
    sources: Mapping[str, str],
    use_fp16: bool,
    partner: Partner[Settings] | None = None,
) -> TrainingRun | None:
    """Begin or resume a run: in stages if the settings ask for it, else as `job.start_run`.

    :param partner: another kind of network to train on the same masks; both are averaged.
    :return: None if the run is complete already.
    :raises UserError: for whatever the user must correct, before anything is written.
    """
    initial = build(settings)
    if not settings.self_training and partner is None:
        return start_run(initial, settings, data, sources, use_fp16)
    if partner is not None:
        partner.build(settings)  # which raises if it cannot be built
    if settings.self_training:
        sources = {**sources, "teacher_models": settings.teacher_models}
        for path in split_paths(settings.teacher_models):
            check_agreement("this run", initial.config, path, load_model(path)[1])
    origin = origin_of(initial, settings, data, sources, use_fp16)
    if partner is not None:
        if load_finished(settings, origin, partner_files(settings)):
            return None
        return PartnerRun(build, partner, settings, data, sources, use_fp16, origin)
    interrupted = load_interrupted(settings, origin)
    if is_complete(interrupted, settings, len(data.train)):
        return None
    return SelfTraining(build, settings, data, sources, use_fp16, origin)
