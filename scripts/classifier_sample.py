"""Sample images from a diffusion network that a classifier guides to their classes."""

import dataclasses

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.networks.config import ClassifierConfig, DiffusionConfig, ModelConfig
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.sampling.config import SampleConfig, parse_labels
from guided_diffusion.sampling.guidance import classifier_gradient, ignoring_classes
from guided_diffusion.sampling.job import SampleJob, check_classifier, guided, identity_of


@dataclasses.dataclass(frozen=True)
class ClassifierSampleConfig(SampleConfig):
    """Sampling."""

    classifier_path: str = flag("", "checkpoint of the classifier")
    classifier_scale: float = flag(1.0, "strength of the classifier's guidance; 0: none")


def main() -> int:
    overrides = parse_flags(
        make_parser(__doc__, ClassifierSampleConfig, ModelConfig, DiffusionConfig, ClassifierConfig)
    )
    dist_util.setup_dist()
    with dist_util.failure_guard():
        settings = from_flags(ClassifierSampleConfig, overrides)
        trained = read_trained(settings.model_path, overrides)
        same = {**dataclasses.asdict(trained.diffusion), "image_size": trained.model.image_size}
        guide = read_trained(settings.classifier_path, overrides, "classifier", defaults=same)
        check_classifier(guide, trained)
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
        return SampleJob(settings, trained, model, labels, cond_fn=cond_fn, also=also).run()


if __name__ == "__main__":
    command(main)()
