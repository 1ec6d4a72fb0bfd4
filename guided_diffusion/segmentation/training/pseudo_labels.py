"""Pseudo-labels: masks of radiographs that have none, as networks trained on other masks see them.

Only what these are sure of is learnt from: pixels by their probability, radiographs by their
uncertainty as a whole (arXiv 2106.05095, section 3.3).
"""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch as th
from tqdm import tqdm

from guided_diffusion.images.geometry import IGNORE
from guided_diffusion.images.image_io import read_image
from guided_diffusion.images.patients import films_of, find_patients
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.signals import StopRequest
from guided_diffusion.runtime.storage import checkpoint, run_lock
from guided_diffusion.runtime.storage.files import write_csv
from guided_diffusion.segmentation.inference.predictor import Ensemble
from guided_diffusion.segmentation.inference.uncertainty import uncertainty_of
from guided_diffusion.segmentation.pipeline import in_batches, prefetch
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.training.dataset import LabelledImages
from guided_diffusion.segmentation.training.loop import SAVE_EVERY

# radiographs per forward pass
_BATCH = 8


@dataclasses.dataclass
class PseudoLabels:
    """Pseudo-labels of the radiographs drawn, as far as there are any, and their file.

    drawn: hashes of all radiographs to label. images, masks: uint8 `[H x W x C]` and `[H x W]` of
    the first of them, at the network's size; IGNORE where the networks are unsure, and in the
    padding. uncertainties: of each, see `uncertainty_of`.
    """

    path: str
    drawn: list[str]
    images: list[np.ndarray] = dataclasses.field(default_factory=list)
    masks: list[np.ndarray] = dataclasses.field(default_factory=list)
    uncertainties: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, path: str) -> "PseudoLabels | None":
        """What `save` wrote; None if there is no such file."""
        if not os.path.exists(path):
            return None
        plain = checkpoint.load(path)
        images, masks = ([t.numpy() for t in plain[part]] for part in ("images", "masks"))
        return cls(path, plain["drawn"], images, masks, plain["uncertainties"])

    def save(self) -> None:
        """Write the file, atomically."""
        run_lock.check_held()
        images, masks = ([th.tensor(a) for a in part] for part in (self.images, self.masks))
        plain = {"drawn": self.drawn, "uncertainties": self.uncertainties}
        checkpoint.save(self.path, {**plain, "images": images, "masks": masks})

    @property
    def complete(self) -> bool:
        """Whether all radiographs drawn have a label."""
        return len(self.masks) == len(self.drawn)

    def most_certain(self, drop: float) -> list[int]:
        """The numbers of all but the least certain, which are the fraction `drop`."""
        kept = max(1, round(len(self.drawn) * (1 - drop)))
        return sorted(np.argsort(self.uncertainties, kind="stable")[:kept].tolist())

    def pairs(self, drop: float, window: tuple[int, int] | None) -> LabelledImages:
        """The most certain, as pairs to learn from.

        :param window: see `LabelledImages`.
        """
        numbers = self.most_certain(drop)
        return LabelledImages(
            tuple(self.drawn[i] for i in numbers),
            [self.images[i] for i in numbers],
            [self.masks[i] for i in numbers],
            window,
        )

    def write_table(self, path: str, names: Sequence[str], drop: float) -> None:
        """Write a CSV table of all radiographs, the least certain first."""
        kept = set(self.most_certain(drop))
        rows = [
            (
                names[i],
                f"{self.uncertainties[i]:.4f}",
                f"{_sure(self.masks[i]):.4f}",
                int(i in kept),
            )
            for i in np.argsort(self.uncertainties, kind="stable")[::-1].tolist()
        ]
        write_csv(path, ("radiograph", "uncertainty", "share_labelled", "learnt_from"), rows)


def _sure(mask: np.ndarray) -> float:
    return float((mask != IGNORE).mean())


def draw_radiographs(
    paths: Sequence[str], digests: Sequence[str], count: int, seed: int
) -> list[int]:
    """Draw `count` radiographs, 0 for all: of as many patients as possible, and no two the same.

    :param digests: hashes of the files: what is drawn depends on these and on the patients alone.
    :return: their numbers.
    """
    patients = find_patients(*zip(*films_of(paths))).groups
    first = {digest: number for number, digest in reversed([*enumerate(digests)])}
    numbers = [first[digest] for digest in sorted(first)]
    generator = np.random.default_rng(rng.derive_seed(seed, "unlabelled radiographs"))
    seen: Counter[int] = Counter()
    turns = []
    for number in (numbers[place] for place in generator.permutation(len(numbers))):
        turns.append((seen[patients[number]], number))
        seen[patients[number]] += 1
    turns.sort(key=lambda turn: turn[0])
    return [number for _, number in turns[: count or None]]


def label(
    labels: PseudoLabels,
    teachers: Ensemble,
    reading: ReadingConfig,
    paths: Sequence[str],
    confidence: float,
    bar: tqdm,
    stop: StopRequest,
) -> None:
    """Label those radiographs that have no label yet, until a signal; save from time to time.

    :param paths: of all radiographs drawn.
    :param reading: of the network that will learn; teachers that read alike see images of its size.
    :param confidence: least probability of a label.
    """
    alike = all(teacher.config.reading == reading for teacher in teachers.segmenters)
    geometry = reading.geometry()

    def read(path: str) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(path, reading.in_channels, reading.intensity_rule())
        return reading.prepare(image), geometry.scaled_image(image) if alike else image

    def results() -> Iterator[tuple[np.ndarray, Prediction]]:
        todo = paths[len(labels.masks) :]
        for batch in in_batches(prefetch(read, todo, ahead=_BATCH), _BATCH):
            if stop.requested:
                return
            finishes = teachers.start([image for _, image in batch])
            for (prepared, _), finish in zip(batch, finishes):
                yield prepared, finish()

    saved_at = time.monotonic()
    for prepared, prediction in results():
        sure = prediction.probabilities.max(0) >= confidence
        mask = np.where(sure, prediction.mask(), np.uint8(IGNORE))
        labels.images.append(prepared)
        labels.masks.append(np.ascontiguousarray(geometry.apply_mask(mask)))
        labels.uncertainties.append(uncertainty_of(prediction))
        bar.update()
        if time.monotonic() - saved_at > SAVE_EVERY:
            labels.save()
            saved_at = time.monotonic()
    labels.save()
