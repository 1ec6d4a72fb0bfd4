"""Sample images from a pretrained diffusion network."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.errors import command
from guided_diffusion.flags import from_flags, given_flags, make_parser
from guided_diffusion.sample_config import SampleConfig
from guided_diffusion.sample_job import SampleJob, class_labels, guided
from guided_diffusion.script_util import DiffusionConfig, ModelConfig
from guided_diffusion.trained import read_trained


def main() -> int:
    given = given_flags(make_parser(__doc__, SampleConfig, ModelConfig, DiffusionConfig))
    dist_util.setup_dist()
    with dist_util.failure_guard():
        settings = from_flags(SampleConfig, given)
        trained = read_trained(settings.model_path, given)
        labels = class_labels(settings, trained)
        model = guided(trained.network(dist_util.dev()), settings, trained)
        return SampleJob(settings, trained, model, labels).run()


if __name__ == "__main__":
    command(main)()
