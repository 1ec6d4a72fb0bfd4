"""The model card of a packed network: README.md, with places that only its authors can fill in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th

from guided_diffusion.networks.record import NetworkRecord
from guided_diffusion.segmentation.model_file import SegmentationConfig

TO_FILL_IN = "*to fill in*"
_KINDS = {
    "unet": "The U-Net of a diffusion model, fine-tuned",
    "union": "A diffusion model's U-Net and a second network, fine-tuned, averaged",
    "smp": "A U-Net of segmentation_models_pytorch",
    "features": "A classifier of frozen features of a diffusion model",
    "mask_diffusion": "A diffusion model that generates masks",
}
_USES = {
    "diffusion": "python scripts/image_sample.py --model_path {title}\n"
    "    python scripts/finetune.py {title} TRAIN/IMG TRAIN/MASK VAL/IMG VAL/MASK",
    "segmentation_guided": "python scripts/image_sample.py --model_path {title} --seg_dir MASKS",
    "super_res": "python scripts/super_res_sample.py --model_path {title} --base_samples SMALL",
    "classifier": "python scripts/classifier_sample.py --classifier_path {title} --model_path"
    " CHECKPOINT",
    "mask_diffusion": "(pack the segm.pth beside the checkpoint, for scripts/predict.py)",
}


@dataclass(frozen=True)
class Card:
    """What the cards of all networks say."""

    title: str
    weights: Mapping[str, th.Tensor]

    def text(self, tags: Sequence[str], sections: Mapping[str, str]) -> str:
        """The card, with its front matter for the Hugging Face Hub."""
        head = ["---", "library_name: guided-diffusion", "tags:", *(f"- {tag}" for tag in tags)]
        head += ["# license: choose one; see the section Licence", "---", "", f"# {self.title}"]
        body = [f"\n## {name}\n\n{text}" for name, text in sections.items()]
        return "\n".join([*head, *body]) + "\n"

    def size(self) -> str:
        count = sum(tensor.numel() for tensor in self.weights.values())
        return f"{count / 1e6:.3g} million weights"


def segmentation_card(
    card: Card, config: SegmentationConfig, best: Any, metrics: Mapping[str, Any]
) -> str:
    """:param best: validation scores of the training. :param metrics: of evaluate.py, or {}."""
    rows = [f"| {c.index} | {_cell(c.name)} | {list(c.color)} |" for c in config.categories]
    classes = "\n".join(["| value in masks | class | colour |", "| --- | --- | --- |", *rows])
    return card.text(
        ["image-segmentation", "medical-imaging", "radiography"],
        {
            "What it is": f"{_KINDS[config.kind]}, for the segmentation of radiographs"
            f" into {len(config.categories)} classes ({card.size()}). Input: {_input(config)}."
            f" Intended for: {TO_FILL_IN}.",
            "Use": _code(f"python scripts/predict.py {card.title} RADIOGRAPHS results"),
            "Classes": classes,
            "Data": _DATA.format(images="Labelled images") + _PRETRAINING,
            "Figures": _figures(best, metrics),
            "Limits": _LIMITS
            + " Scores hold for the data they were measured on; check the masks on"
            " radiographs of your own before you rely on them."
            + (_SIDES if config.flip_swaps is None else ""),
            "Licence": _LICENCE,
        },
    )


def network_card(card: Card, kind: str, record: NetworkRecord[Any]) -> str:
    """The card of a pretrained network.

    :param kind: one of `trained.KINDS`.
    """
    steps, size = record.diffusion.diffusion_steps, record.reading.image_size
    classes = f" Its classes: {', '.join(map(_cell, record.classes))}." if record.classes else ""
    return card.text(
        ["diffusion", "medical-imaging", "radiography"],
        {
            "What it is": f"A pretrained network of kind {kind} ({card.size()}), for images of"
            f" {size} pixels with {record.reading.in_channels} channel(s) and {steps} diffusion"
            f" steps.{classes} Intended for: {TO_FILL_IN}.",
            "Use": _code(_USES[kind].format(title=card.title)),
            "Data": _DATA.format(images="Images"),
            "Limits": _LIMITS
            + " Diffusion models can reproduce images they were trained on: do not"
            " share a network that was trained on images which must not be seen.",
            "Licence": _LICENCE,
        },
    )


_DATA = (
    "- {images}: " + TO_FILL_IN + " (number, modality, devices, years, population)\n"
    "- Labelled by: " + TO_FILL_IN + " (whom, how, how well they agree)\n"
    "- Patients apart in training, validation and test: " + TO_FILL_IN + "\n"
    "- Consent, approval and licence of the data: " + TO_FILL_IN
)
_PRETRAINING = "\n- Pretrained on: " + TO_FILL_IN
_LIMITS = "Not a medical device: research only. Not tested on: " + TO_FILL_IN + "."
_SIDES = " It was not trained on mirrored images."
_LICENCE = (
    TO_FILL_IN + ". The data may restrict it, and so may the licence of pretrained weights. Put its"
    " name into the first lines of this file as well."
)


def _code(text: str) -> str:
    return f"    {text}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _input(config: SegmentationConfig) -> str:
    reading = config.reading
    size = reading.image_size
    sides = f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))
    colours = "grey" if reading.in_channels == 1 else "colour"
    return (
        f"radiographs of any size, {colours}, fitted to {sides} pixels ({reading.resize}), grey"
        f" levels by the rule {reading.intensity}; masks come out at the radiograph's own size"
    )


def _figures(best: Any, metrics: Mapping[str, Any]) -> str:
    lines = []
    if metrics:
        lines += [f"On {metrics['images']} images (data: {TO_FILL_IN}):\n"]
        lines += ["| class | Dice | IoU |", "| --- | --- | --- |"]
        for name, score in metrics["per_class"].items():
            lines.append(f"| {_cell(name)} | {_number(score['dice'])} | {_number(score['iou'])} |")
        mean = (_number(metrics.get(name)) for name in ("mean_dice", "mean_iou"))
        lines += [f"| mean without background | {' | '.join(mean)} |", ""]
        interval = (metrics.get("intervals") or {}).get("mean_dice")
        if isinstance(interval, list) and len(interval) == 2:
            low, high = map(_number, interval)
            lines.append(f"95 % interval of the mean Dice over the images: {low} to {high}.")
    else:
        lines.append(f"{TO_FILL_IN}: evaluate.py on images of other patients, then pack again with")
        lines.append("`--evaluation`.")
    if isinstance(best, dict) and isinstance(best.get("mean_dice"), float):
        lines.append(
            f"On the validation images, which chose the weights: mean Dice"
            f" {_number(best['mean_dice'])}."
        )
    return "\n".join(lines)


def _number(value: Any) -> str:
    known = isinstance(value, int | float) and value == value
    return f"{value:.3f}" if known else "-"
