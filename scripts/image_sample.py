"""Sample images from a pretrained diffusion network, unguided or guided by masks."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.sampling.job import SampleJob, class_labels, guided
from guided_diffusion.sampling.mask_guidance import (
    GuidedSampleConfig,
    guided_job,
    guiding_masks,
    read_trained_image_network,
)


def main() -> int:
    overrides = parse_flags(make_parser(__doc__, GuidedSampleConfig, GuidedConfig, DiffusionConfig))
    dist_util.setup_dist()
    with dist_util.failure_guard():
        settings = from_flags(GuidedSampleConfig, overrides)
        trained = read_trained_image_network(settings.model_path, overrides)
        masks = guiding_masks(settings, trained)
        labels = class_labels(settings, trained)
        if masks is not None:
            return guided_job(settings, trained, labels, masks).run()
        model = guided(trained.network(dist_util.dev()), settings, trained)
        return SampleJob(settings, trained, model, labels).run()


if __name__ == "__main__":
    command(main)()
