"""Sharpen small images with a super-resolution network."""

import dataclasses

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion import dist_util
from guided_diffusion.networks.config import DiffusionConfig, SuperResConfig
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.flags import flag, from_flags, make_parser, parse_flags
from guided_diffusion.sampling.config import SampleConfig
from guided_diffusion.sampling.job import SampleJob, class_labels, guided
from guided_diffusion.sampling.super_res import fingerprint, load_base_samples


@dataclasses.dataclass(frozen=True)
class SuperResSampleConfig(SampleConfig):
    """Sampling; image k sharpens small image k modulo their number."""

    base_samples: str = flag("", "small images: .npz of a sampling script, folder or glob")


def main() -> int:
    overrides = parse_flags(
        make_parser(__doc__, SuperResSampleConfig, SuperResConfig, DiffusionConfig)
    )
    dist_util.setup_dist()
    with dist_util.failure_guard():
        settings = from_flags(SuperResSampleConfig, overrides)
        trained = read_trained(settings.model_path, overrides, "super_res")
        small, own_labels = load_base_samples(
            settings.base_samples, trained.reading, trained.model.small_size, trained.classes
        )
        labels = class_labels(settings, trained)
        if labels and own_labels and not labels.chosen:
            labels = dataclasses.replace(labels, chosen=tuple(own_labels))
        model = guided(trained.network(dist_util.dev()), settings, trained)

        def conditions(indices):
            return {"low_res": small[[k % len(small) for k in indices]].to(dist_util.dev())}

        also = {"base_samples": fingerprint(small)}
        return SampleJob(settings, trained, model, labels, conditions, also=also).run()


if __name__ == "__main__":
    command(main)()
