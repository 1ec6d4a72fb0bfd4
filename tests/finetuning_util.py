"""Folders of a labelled split as arguments, and what fine-tuning leaves."""

import torch as th


def folders(split):
    """TRAIN's radiographs and masks, then VAL's."""
    return [str(split / part / kind) for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK")]


def weights(path):
    return th.load(path, weights_only=True)["state_dict"]


def same(one, other):
    return all(th.equal(one[k], other[k]) for k in one)
