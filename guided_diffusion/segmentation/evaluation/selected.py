"""Labelled images that are not drawn but chosen, as `prepare_data.py --action select` would."""

from collections.abc import Collection

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.images.patients import find_patients
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.segmentation.evaluation.draws import Pairs, find_films
from guided_diffusion.segmentation.selection.choose import choose
from guided_diffusion.segmentation.selection.features import Encoder
from guided_diffusion.segmentation.selection.pool import Pool, read_pool


class Selector:
    """Chooses by what a pretrained network sees in the radiographs; no mask is looked at.

    :param pairs: those to choose from.
    :param checkpoint: of the network.
    """

    def __init__(self, pairs: Pairs, checkpoint: str):
        encoder = Encoder(read_trained(checkpoint, {}), dist_util.dev())
        names, paths = zip(*find_films(pairs))
        self.names = dict(zip(paths, names))
        self.patients = dict(zip(paths, find_patients(names, paths).groups))
        pool = read_pool(paths, encoder)
        self.paths, self.vectors = pool.paths, np.concatenate(pool.vectors)

    def choose(self, k: int, without: Collection[str] = ()) -> list[str]:
        """Names of k images, the best first.

        :param without: names of images that cannot be chosen.
        :raises UserError: for more images than patients.
        """
        left = [n for n, path in enumerate(self.paths) if self.names[path] not in without]
        pool = Pool([self.paths[n] for n in left], [self.vectors[left]])
        return [self.names[pool.paths[n]] for n in choose(pool, k, self.patients).chosen]
