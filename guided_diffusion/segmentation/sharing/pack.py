"""A model file or a checkpoint to a folder to share: weights, configuration and a model card.

What could tell whose images a network was trained on stays behind: paths, names of files, hashes
and the flags of the training.
"""

import dataclasses
import os
from typing import Any, cast

import torch as th

from guided_diffusion.networks.trained import KINDS, Trained, read_trained
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint, packed
from guided_diffusion.runtime.storage.files import check_output, read_sections, write_atomically
from guided_diffusion.segmentation.evaluation.scoring import without_nan
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.segmentation.sharing.card import Card, network_card, segmentation_card
from guided_diffusion.segmentation.sharing.config import PackConfig

_METRICS = "metrics.json"


def pack(model: str, output: str, config: PackConfig) -> None:
    """Write the folder, and say what is in it.

    :param model: a segmentation model, or a checkpoint with its config.json.
    :raises UserError: before anything is written, if the model cannot be read, or a file exists.
    """
    check_output(output, folder=True)
    paths = [os.path.join(output, name) for name in (packed.WEIGHTS, packed.CONFIG, packed.CARD)]
    if existing := [path for path in paths if os.path.lexists(path)]:
        raise UserError(f"{existing[0]} exists already: choose another folder")
    metrics = _read_metrics(config.evaluation) if config.evaluation else {}
    title = config.title or os.path.basename(os.path.abspath(output))
    values = checkpoint.load(model)
    is_segmentation = isinstance(values, dict) and "state_dict" in values
    plain, weights, card = (
        _segmentation(model, title, metrics) if is_segmentation else _network(model, title)
    )
    if metrics and not is_segmentation:
        raise UserError(f"--evaluation is for segmentation models; {model} is none")
    write_atomically(paths[2], lambda file: file.write(card.encode()))
    packed.write(output, plain, weights)
    print(
        f"{model} packed into {output}, without paths and names of the training data; complete"
        f" {packed.CARD} before you share it"
    )


def _segmentation(
    path: str, title: str, metrics: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, th.Tensor], str]:
    _, config, values = load_model(path)
    plain = config.to_plain()
    best = values.get("best")
    if isinstance(best, dict):
        plain["best"] = without_nan(best)
    card = segmentation_card(Card(title, values["state_dict"]), config, best, metrics)
    return plain, values["state_dict"], card


def _network(path: str, title: str) -> tuple[dict[str, Any], dict[str, th.Tensor], str]:
    stored = checkpoint.read_config(path)
    if stored is None:
        raise UserError(
            f"{path} has no {packed.CONFIG} beside it, which describes the network: copy it from"
            " the run's folder"
        )
    kind = stored.get("kind", "diffusion")
    known = isinstance(kind, str) and kind in KINDS
    trained: Trained = read_trained(path, {}, kind if known else "diffusion")
    trained.network("cpu")  # which raises if the weights do not fit
    sections = trained.sections(kind)
    for name in ("model", "diffusion"):
        sections[name] = dataclasses.asdict(sections[name])
    weights = cast(dict[str, th.Tensor], dict(trained.weights))
    card = network_card(Card(title, weights), kind, trained)
    return {"format": packed.NETWORK_FORMAT, **sections}, weights, card


def _read_metrics(path: str) -> dict[str, Any]:
    """The figures that evaluate.py wrote."""
    if os.path.isdir(path):
        path = os.path.join(path, _METRICS)
    metrics = read_sections(path, "per_class")
    scores = metrics["per_class"].values()
    if not isinstance(metrics.get("images"), int) or not all(
        isinstance(score, dict) and {"dice", "iou"} <= set(score) for score in scores
    ):
        raise UserError(f"{path} holds no figures per class: name a folder that evaluate.py wrote")
    return metrics
