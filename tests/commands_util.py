"""A short run of every command, on tiny data and networks."""

import functools
from pathlib import Path

import mask_diffusion_util
from conftest import TINY, draw_pairs
from golden_util import fill_parameters
from import_util import draw_annotations
from paths import ROOT
from sampling_util import CLASSES, CLASSIFIER, NETWORK, write_shapes, write_trained

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.conditional import GuidedConfig
from guided_diffusion.networks.config import DiffusionConfig, SuperResConfig
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.networks.mask_diffusion import describe

DIFFUSION = DiffusionConfig(diffusion_steps=4, noise_schedule="cosine", learn_sigma=True)
SUPER_RES = from_mapping(SuperResConfig, {**vars(NETWORK), "large_size": 16, "small_size": 8})
GUIDED = from_mapping(
    GuidedConfig, {**vars(NETWORK), "segmentation_guided": True, "num_segmentation_classes": 3}
)

_NETWORK = (
    "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 1 --attention_resolutions"
    " 8"
)
_DIFFUSION = "--diffusion_steps 4 --noise_schedule cosine"
_TRAIN = f"{_NETWORK} {_DIFFUSION} --max_steps 1 --sample_interval 0"
_LABELLED = "TRAIN/IMG TRAIN/MASK VAL/IMG VAL/MASK"
_SAMPLE = "--num_samples 1 --out_dir OUT"

# What to run in the folder that `prepare_commands` fills, by script; OUT is the output: a file
# where it has an ending. Those that know no flag for it write to $OPENAI_LOGDIR; serve.py writes
# nothing.
COMMANDS = {
    "image_train.py": f"--data_dir TRAIN/IMG --image_size 16 {_TRAIN}",
    "super_res_train.py": f"--data_dir TRAIN/IMG --large_size 16 --small_size 8 {_TRAIN}",
    "classifier_train.py": "--data_dir CLASSES --image_size 16 --num_classes 2"
    " --classifier_width 32"
    f" --classifier_depth 1 --classifier_attention_resolutions 8 {_DIFFUSION} --iterations 1",
    "mask_diffusion_train.py": f"{_LABELLED} --image_size 16 {_TRAIN} --weights_save OUT.pth",
    "finetune.py": f"diffusion/ema_0.9_000010.pt {_LABELLED} --epochs 1 --weights_save OUT.pth",
    "baseline_train.py": f"{_LABELLED} --network unet --image_size 16 {_NETWORK} --epochs 1"
    " --weights_save OUT.pth",
    "label_efficiency.py": f"{_LABELLED} --checkpoint diffusion/ema_0.9_000010.pt --k 1 --seeds 0"
    " --methods plain --steps 1 --tune_steps 1 --tune_lr 1e-3 -o OUT",
    "simulate_loop.py": f"{_LABELLED} --checkpoint diffusion/ema_0.9_000010.pt --start 1 --add 1"
    " --rounds 1 --seeds 0 --steps 1 -j 1 -o OUT",
    "probe.py": "diffusion . -o OUT",
    "predict.py": "segm.pth TRAIN/IMG OUT --save_uncertainty True",
    "evaluate.py": "VAL/IMG VAL/MASK --model segm.pth --output OUT --bootstrap 20",
    "evaluate_guidance.py": "segm.pth VAL --output OUT",
    "evaluate_samples.py": "TRAIN/IMG CLASSES --features ddpm --nearest_k 1 --out_dir OUT"
    " --model_path diffusion/ema_0.9_000010.pt",
    "image_sample.py": f"--model_path diffusion/ema_0.9_000010.pt {_SAMPLE}",
    "classifier_sample.py": "--model_path diffusion/ema_0.9_000010.pt"
    f" --classifier_path classifier/ema_0.9_000010.pt {_SAMPLE}",
    "super_res_sample.py": "--model_path super_res/ema_0.9_000010.pt --base_samples SMALL"
    f" {_SAMPLE}",
    "image_nll.py": "--model_path diffusion/ema_0.9_000010.pt --data_dir CLASSES --num_samples 1"
    " --out_dir OUT",
    "export_onnx.py": "segm.pth OUT.onnx",
    "pack_model.py": "segm.pth OUT",
    "prepare_data.py": "--action organize --image_dir TRAIN/IMG --mask_dir TRAIN/MASK --output_dir"
    " OUT",
    "serve.py": "segm.pth --port 7869",
    "rgb2tif.py": "TRAIN/MASK OUT --unknown background",
    "export_labels.py": "TRAIN/MASK TRAIN/IMG OUT --format coco,labelme,cvat,nifti,nrrd",
    "import_labels.py": "DRAWN OUT",
}

# Where a flag shows its effect, by "SCRIPT FLAG" or "FLAG": another command line, or after "+" what
# COMMANDS lack.
_UNLABELLED = "+ --unlabeled_dir VAL/IMG --teachers 1 --confidence 0.35"
_GUIDED = f"--model_path guided/ema_0.9_000010.pt --seg_dir VAL/MASK {_SAMPLE}"
_FEATURES = (
    f"{_LABELLED} --network features --checkpoint diffusion/ema_0.9_000010.pt --feature_blocks 0"
    " --epochs 1 --weights_save OUT.pth"
)
_CREATE = "--action create-sample --output_dir OUT --num_samples 2 --image_size 32"
_SELECT = (
    "--action select --image_dir TRAIN/IMG --output_dir OUT --k 1 --checkpoint"
    " diffusion/ema_0.9_000010.pt"
)
VARIANTS = {
    **dict.fromkeys(
        ["teachers", "teacher_models", "unlabeled_images", "drop_uncertain"],
        _UNLABELLED,
    ),
    **dict.fromkeys(["confidence", "pseudo_augmentation", "student_steps", "rounds"], _UNLABELLED),
    "synthetic_weight": "+ --synthetic_dir VAL",
    "percentile_low": "+ --intensity percentile",
    "percentile_high": "+ --intensity percentile",
    "window_center": "+ --intensity window --window_width 255 --window_center 128",
    "window_width": "+ --intensity window --window_width 255 --window_center 128",
    "eta": "+ --sampler ddim",
    "image_train.py num_head_channels": "+ --attention_resolutions 16",
    "predict.py tolerance": "+ --export coco",
    "predict.py labelled": "+ --label_next 1",
    "predict.py avoid": "+ --label_next 1",
    "predict.py group": "+ --label_next 1",
    "probe_interval": "+ --probe_dir .",
    "probe_categories": "+ --probe_dir .",
    "samples_per_mask": _GUIDED,
    "ablate_classes": _GUIDED,
    "seg_split": _GUIDED,
    "feature_blocks": _FEATURES,
    "feature_timesteps": _FEATURES,
    **{
        f"prepare_data.py {flag}": _CREATE
        for flag in ("image_size", "num_samples", "num_unlabelled", "train_images", "train_split")
    },
    **{f"prepare_data.py {flag}": _SELECT for flag in ("checkpoint", "k", "skip_bad_images")},
    **dict.fromkeys(
        ["predict.py num_samples", "predict.py steps", "predict.py seed"], "masks.pth TRAIN/IMG OUT"
    ),
}


@functools.cache
def all_commands() -> list[str]:
    """Every script of the project, but for those that are no commands for users."""
    found = [path.name for folder in ("scripts", "tools") for path in (ROOT / folder).glob("*.py")]
    of_scripts = ("_path.py", "demo_report.py", "loop_report.py")
    return sorted(name for name in found if name not in of_scripts)


def path_of(name: str) -> Path:
    """The file of a command."""
    return next(p for p in (ROOT / "scripts" / name, ROOT / "tools" / name) if p.exists())


def prepare_commands(folder: Path) -> Path:
    """Fill a folder with the data and networks that COMMANDS name."""
    for seed, name in enumerate(("TRAIN", "VAL")):
        draw_pairs(folder / name, 3 - seed, size=(16, 16), seed=seed)
    draw_annotations(folder / "DRAWN", count=2)
    write_shapes(folder / "CLASSES", count=4)
    write_shapes(folder / "SMALL", count=2, size=8)
    write_trained(folder / "diffusion", NETWORK, DIFFUSION)
    write_trained(folder / "classifier", CLASSIFIER, DIFFUSION, "classifier", CLASSES)
    write_trained(folder / "super_res", SUPER_RES, DIFFUSION, "super_res")
    write_trained(folder / "guided", GUIDED, DIFFUSION, "segmentation_guided")
    reading, categories = ReadingConfig(16, 1), generic_categories(3)
    drawing = describe(mask_diffusion_util.config_of(3), DIFFUSION, reading, categories)
    save_model(str(folder / "masks.pth"), drawing, mask_diffusion_util.build(3).state_dict())
    config = SegmentationConfig(TINY, reading, categories)
    save_model(str(folder / "segm.pth"), config, fill_parameters(config.build()).state_dict())
    return folder


def arguments(script: str, out: str, flag: str = "") -> list[str]:
    """The arguments of COMMANDS with an output, as the flag needs them."""
    variant = VARIANTS.get(f"{script} {flag}") or VARIANTS.get(flag, "")
    line = variant if variant and not variant.startswith("+") else COMMANDS[script] + variant[1:]
    return [word.replace("OUT", out) for word in line.split()]
