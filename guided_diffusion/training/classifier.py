"""Training of classifiers of noised images, for classifier guidance (arXiv 2105.05233, sec. 4)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch as th
import torch.nn.functional as F

from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import Batch
from guided_diffusion.images.files import list_radiographs
from guided_diffusion.images.image_io import check_images
from guided_diffusion.images.patients import films_of, shared_patients
from guided_diffusion.networks.config import ClassifierConfig
from guided_diffusion.runtime.command_line.flags import Overrides
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.config import ClassifierTrainConfig
from guided_diffusion.training.run import open_run, run_training


def train(overrides: Overrides) -> int:
    """Train a classifier; returns the command's exit code.

    :param overrides: the flags on the command line.
    """
    run = open_run(overrides, "classifier", ClassifierConfig, ClassifierTrainConfig)
    validation = None
    if run.train.val_data_dir:
        validation = partial(run.batches, data_dir=run.train.val_data_dir)
        if shared := dist_util.is_main() and _shared(run.train):
            logger.log(f"warning: the held-out images are not independent: {shared}")
    loop = run.loop(ClassifierLoop, run.build(), run.batches, validation=validation)
    return run_training(loop, run)


def _shared(train: ClassifierTrainConfig) -> str:
    one, other = (list_radiographs(path)[0] for path in (train.data_dir, train.val_data_dir))
    if not train.skip_bad_images:
        check_images(other)
    return shared_patients(films_of(one), films_of(other))


class ClassifierLoop(TrainLoop):
    """TrainLoop for a classifier of noised images.

    :param settings: of the training.
    :param validation: from a number n to the held-out batches from the n-th on; None: no
        evaluation while training.
    """

    settings: ClassifierTrainConfig

    def __init__(
        self,
        *,
        settings: ClassifierTrainConfig,
        validation: Callable[[int], Iterator[Batch]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(settings=settings, **kwargs)
        self.validation: Iterator[Batch] | None = (
            validation(self.step // settings.eval_interval) if validation else None
        )

    def loss_terms(
        self,
        model: th.nn.Module,
        images: th.Tensor,
        ts: th.Tensor,
        kwargs: dict[str, th.Tensor],
        noise: th.Tensor,
    ) -> dict[str, th.Tensor]:
        """Cross entropy, top-1 and top-5 accuracy; clean images are at timestep 0."""
        if self.settings.noised:
            images = self.diffusion.q_sample(images, ts, noise=noise)
        else:
            ts = th.zeros_like(ts)
        logits = model(images, ts).float()
        classes = kwargs["y"]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]
        return {
            "loss": F.cross_entropy(logits, classes, reduction="none"),
            "acc@1": best[:, 0].float(),
            "acc@5": best.any(dim=1).float(),
        }

    def run_step(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """One optimisation step, then an evaluation every `eval_interval` steps."""
        super().run_step(batch, cond)
        if self.validation is not None and self.step % self.settings.eval_interval == 0:
            self._evaluate(*next(self.validation))

    @th.no_grad()
    def _evaluate(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """Log the loss and accuracies of a held-out batch."""
        self.model.eval()
        for first in range(0, len(batch), self.microbatch):
            rows = slice(first, first + self.microbatch)
            _, _, terms = self.losses(self.model, batch, cond, rows)
            for name, values in terms.items():
                logger.logkv_mean(f"val_{name}", values.mean(), len(values))
        self.model.train()
