"""Training of classifiers of noised images, for guidance (arXiv 2105.05233, section 4)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch as th
import torch.nn.functional as F

from guided_diffusion import logger
from guided_diffusion.image_datasets import Batch
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.flags import flag
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.run import TrainConfig


@dataclasses.dataclass(frozen=True)
class ClassifierTrainConfig(TrainConfig):
    """Training; the class of an image is its file's name up to the first underscore."""

    val_data_dir: str = flag("", "folder of images to evaluate on while training; '': none")
    noised: bool = flag(True, "train on images at every level of noise, as guidance needs it")
    iterations: int = flag(150000, "steps after which training ends")
    anneal_lr: bool = flag(False, "learning rate falls linearly to 0 over the iterations")
    eval_interval: int = flag(5, "steps between evaluations, of a batch each")
    lr: float = flag(3e-4, "learning rate of AdamW")
    batch_size: int = flag(4, "images a rank and step")
    ema_rate: str = flag("", "rates of averaged weights, separated by commas; '': none")
    # follow from the flags above, or mean nothing here
    max_steps: int = dataclasses.field(init=False, default=0)
    lr_anneal_steps: int = dataclasses.field(init=False, default=0)
    sample_interval: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        for name in ("iterations", "eval_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        object.__setattr__(self, "max_steps", self.iterations)
        object.__setattr__(self, "lr_anneal_steps", self.iterations if self.anneal_lr else 0)


class ClassifierLoop(TrainLoop):
    """TrainLoop for a network that tells the classes of noised images.

    :param noised: False trains on clean images, at timestep 0.
    :param validation: a function from a number to an iterator over batches of other images from
        that number on, or None.
    :param eval_interval: steps between evaluations on one of these batches.
    """

    def __init__(
        self,
        *,
        noised: bool = True,
        validation: Any = None,
        eval_interval: int = 5,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.noised = noised
        self.eval_interval = eval_interval
        self.validation: Iterator[Batch] | None = (
            validation(self.step // eval_interval) if validation else None
        )

    def loss_terms(self, model, images, ts, kwargs, noise) -> dict[str, th.Tensor]:
        """Cross entropy, and whether the right class is the first, and among the first five."""
        if self.noised:
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
        """One optimisation step; then, where it is time, an evaluation."""
        super().run_step(batch, cond)
        if self.validation is not None and self.step % self.eval_interval == 0:
            self._evaluate(*next(self.validation))

    @th.no_grad()
    def _evaluate(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """Log the terms of a batch of images that are not trained on."""
        self.model.eval()
        for first in range(0, len(batch), self.microbatch):
            rows = slice(first, first + self.microbatch)
            _, _, terms = self.losses(self.model, batch, cond, rows)
            for name, values in terms.items():
                logger.logkv_mean(f"val_{name}", values.mean())
        self.model.train()
