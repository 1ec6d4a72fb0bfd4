"""Sampling guided by a classifier (arXiv 2105.05233, section 4)."""

import dataclasses

from guided_diffusion import dist_util
from guided_diffusion.networks.trained import Trained, read_trained
from guided_diffusion.runtime.command_line.flags import Overrides
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.choices import parse_labels
from guided_diffusion.sampling.config import (
    ClassifierSampleConfig,
    said_of_defaults,
    sample_settings,
)
from guided_diffusion.sampling.guidance import classifier_gradient, ignoring_classes
from guided_diffusion.sampling.job import SampleJob, as_flags_say, guided, identity_of


def classifier_job(overrides: Overrides) -> SampleJob:
    """The job of `classifier_sample.py`.

    :param overrides: the flags given on the command line.
    :raises UserError: if the classifier cannot guide the diffusion network.
    """
    settings = sample_settings(ClassifierSampleConfig, overrides)
    trained = as_flags_say(read_trained(settings.model_path, overrides), settings)
    same = {**dataclasses.asdict(trained.diffusion), "image_size": trained.model.image_size}
    guide = read_trained(settings.classifier_path, overrides, "classifier", defaults=same)
    guide = as_flags_say(guide, settings)
    _check_classifier(guide, trained)
    labels = parse_labels(
        settings.class_labels, guide.classes, guide.model.num_classes, settings.seed
    )
    network = trained.network(dist_util.dev())
    if trained.model.class_cond:
        model = guided(network, settings, trained)
    else:
        model = ignoring_classes(network)
    classifier = guide.network(dist_util.dev())
    cond_fn = classifier_gradient(classifier, settings.classifier_scale)
    also = {"classifier": identity_of(guide), "classifier_scale": settings.classifier_scale}
    said = said_of_defaults(overrides)
    return SampleJob(settings, trained, model, labels, cond_fn=cond_fn, also=also, defaults=said)


def _check_classifier(classifier: Trained, trained: Trained) -> None:
    """Check that a classifier was trained on the same images, diffusion process and classes.

    :raises UserError: naming the setting that differs.
    """
    sides = (classifier, trained)
    pairs = [
        (name, *(getattr(side.model, name) for side in sides))
        for name in ("image_size", "in_channels")
    ]
    pairs += [
        (name, *(getattr(side.diffusion, name) for side in sides))
        for name in ("diffusion_steps", "noise_schedule", "rescale_timesteps")
    ]
    if trained.model.class_cond and trained.classes and classifier.classes:
        pairs.append(("classes", classifier.classes, trained.classes))
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise UserError(
                f"{classifier.path} cannot guide {trained.path}: {name} is {theirs} there and"
                f" {ours} here"
            )
