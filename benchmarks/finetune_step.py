"""Fine-tuning on few images against pretraining, per image, in turns.

    python benchmarks/finetune_step.py [--batch_sizes 2,8] [--pretrain_batch 8] [model flags]

A step of fine-tuning is augmentation, forward, loss, backward and optimiser on generated images;
one of pretraining is the training loop's. By default the network of flags/unet_small.sh.
"""

import dataclasses
import tempfile

import measuring
import numpy as np
import torch as th

from guided_diffusion import logger
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.networks.operations import operations_of
from guided_diffusion.runtime.command_line.flags import flag, from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import command
from guided_diffusion.segmentation.training.augment import Augmentation
from guided_diffusion.segmentation.training.dataset import LabelledImages, training_batches
from guided_diffusion.segmentation.training.losses import SegmentationLoss
from guided_diffusion.stepper import Stepper
from guided_diffusion.train_util import TrainLoop

SMALL = ModelConfig(
    image_size=64,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    num_head_channels=32,
    attention_resolutions="16,8",
    resblock_updown=True,
    learn_sigma=True,
)
IMAGES = 10  # labelled


@dataclasses.dataclass(frozen=True)
class Settings(measuring.TimedSettings):
    """Benchmark settings; the model flags define the network to measure."""

    batch_sizes: str = flag("2,8", "images per step of fine-tuning, comma-separated", basic=True)
    pretrain_batch: int = flag(8, "images per step of pretraining", least=1, basic=True)
    augmentation: str = flag("medium", "see finetune.py", basic=True)
    classes: int = flag(5, "output channels of the segmentation network", least=2, basic=True)


def labelled(config: ModelConfig, classes: int) -> LabelledImages:
    """Images and masks of noise."""
    generator, side = np.random.default_rng(0), config.image_size
    images = generator.integers(0, 256, (IMAGES, side, side, config.in_channels), np.uint8)
    masks = generator.integers(0, classes, (IMAGES, side, side), np.uint8)
    return LabelledImages(tuple(map(str, range(IMAGES))), images, masks)


def finetuning(settings: Settings, config: ModelConfig, device, precision: str, batch: int):
    """A step of fine-tuning, and its operations."""
    model = config.build_segmentation(settings.classes, None, 1).to(device)
    stepper = Stepper(model, lr=1e-6, precision=precision, max_grad_norm=1.0)
    loss = SegmentationLoss("ce+dice").to(device)
    data = labelled(config, settings.classes)
    batches = training_batches(data, batch, Augmentation(settings.augmentation), 0, 0)

    def step() -> None:
        images, masks = (part.to(device) for part in next(batches))
        with stepper.autocast():
            scores = stepper.model(images)
        stepper.backward(loss.of(loss.sums(scores, masks)))
        stepper.step()

    shape = (batch, config.in_channels, config.image_size, config.image_size)
    return step, operations_of(model, th.zeros(shape), backward=True)


def pretraining(settings: Settings, config: ModelConfig, device, precision: str):
    """A step of the training loop on a batch in memory, and its operations."""
    loop = TrainLoop(
        model=config.build().to(device),
        diffusion=DiffusionConfig(learn_sigma=config.learn_sigma).build(),
        data=iter(()),
        batch_size=settings.pretrain_batch,
        microbatch=-1,
        lr=1e-6,
        ema_rate=0.9999,
        log_interval=10,
        save_interval=10**9,
        resume_checkpoint="none",
        precision=precision,
        max_grad_norm=1.0,
    )
    shape = (settings.pretrain_batch, config.in_channels, config.image_size, config.image_size)
    images, steps = th.rand(shape) * 2 - 1, th.zeros(shape[0])
    operations = operations_of(loop.model, images, steps, backward=True)
    return lambda: loop.run_step(images, {}), operations


def main() -> int:
    overrides = parse_flags(make_parser(__doc__, Settings, ModelConfig))
    settings = from_flags(Settings, overrides)
    config = measuring.model_config(overrides, SMALL)
    device = measuring.set_up_device(settings)
    cases = []
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["csv"]):
        for precision in measuring.usable_precisions(settings.precision, device):
            made = {"pretraining": (*pretraining(settings, config, device, precision), None)}
            for batch in map(int, settings.batch_sizes.split(",")):
                step = finetuning(settings, config, device, precision, batch)
                made[f"fine-tuning, batch of {batch}"] = (*step, batch)
            cases += [
                measuring.Case(name, call, operations, precision, batch or settings.pretrain_batch)
                for name, (call, operations, batch) in made.items()
            ]
        values = measuring.run_cases(cases, device, settings)
    for case in cases:
        whole = next(c for c in cases if c.precision == case.precision)
        ratio = (case.median / case.images) / (whole.median / whole.images)
        print(f"{case.name}, {case.precision}: {ratio:.2f} times pretraining's time per image")
    measuring.write_json(settings.json, values)
    return 0


if __name__ == "__main__":
    command(main)()
