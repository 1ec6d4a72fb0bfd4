"""Pretrain a diffusion network on unlabelled images, or on images guided by their masks."""

import _path  # noqa: F401 - finds the package in a checkout that is not installed

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.runtime.command_line.parsing import CommandParser, make_parser, parse_flags
from guided_diffusion.runtime.command_line.process_flags import ProcessConfig, begin
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.evaluation.probe_config import TrainingProbeConfig
from guided_diffusion.training.config import GuidedTrainConfig, PretrainConfig, RunFolderConfig


def parser() -> CommandParser:
    """The command's flags and arguments."""
    return make_parser(
        __doc__,
        GuidedTrainConfig,
        PretrainConfig,
        TrainingProbeConfig,
        GuidedConfig,
        DiffusionConfig,
        ReadingConfig,
        RunFolderConfig,
        ProcessConfig,
    )


def main() -> int:
    overrides = begin(parse_flags(parser()))

    from guided_diffusion import dist_util
    from guided_diffusion.training import diffusion, guidance
    from guided_diffusion.training.dry_run import dry_run

    guided = overrides.get("segmentation_guided", False)
    if not guided:
        guidance.refuse_guidance(overrides)
    dist_util.setup_dist()
    with dist_util.failure_guard():
        probe = None
        if any(name.startswith("probe_") for name in overrides):
            from guided_diffusion.segmentation.evaluation.probing import training_probe

            probe = training_probe(overrides)
        if overrides.get("dry_run"):
            estimate = dry_run(overrides, GuidedConfig if guided else ModelConfig)
            if dist_util.is_main():
                print(estimate)
            return 0
        return guidance.train(overrides) if guided else diffusion.train(overrides, probe)


if __name__ == "__main__":
    command(main)()
