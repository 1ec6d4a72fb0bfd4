"""Import paths of version 0.1 keep working: modules found at their new place, with a warning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

_SEGMENTATION = {
    "networks": "feature_classifier mask_diffusion padding smp_unet",
    "training": "augment baselines dataset finetune layers learning losses"
    " mask_process mask_training noised_input",
    "inference": "onnx_export results serve uncertainty views",
    "evaluation": "calibration efficiency_tables faithfulness label_efficiency mask_pairs"
    " statistics",
    "visuals": "color_masks render report",
}
_TOP = {
    "runtime": "errors log_formats memory progress rng signals",
    "runtime.command_line": "flags",
    "runtime.ranks": "failure launch",
    "runtime.storage": "checkpoint",
    "images": "geometry reading",
    "networks": "compiled conditional infer operations trained",
    "training": "dry_run",
    "sampling": "features likelihood pictures solvers",
}
# 0.1's module -> where its names are now; the first module that has a name provides it
MOVED: dict[str, tuple[str, ...]] = {
    **{name: (f"{folder}.{name}",) for folder, names in _TOP.items() for name in names.split()},
    **{
        f"segmentation.{name}": (f"segmentation.{folder}.{name}",)
        for folder, names in _SEGMENTATION.items()
        for name in names.split()
    },
    "dicom_io": ("images.dicom_io", "images.dicom_file", "images.decoded"),
    "image_io": ("images.image_io", "images.masks", "images.files"),
    "image_files": ("sampling.images",),
    "guidance": ("sampling.guidance",),
    "super_res": ("training.super_res", "sampling.super_res"),
    "segmentation.predict": ("segmentation.inference.predictor", "segmentation.prediction"),
    "segmentation.consistency": ("segmentation.training.unlabelled",),
    "segmentation.phantoms": ("preparation.phantoms",),
    "segmentation.label_efficiency": (
        *("segmentation.evaluation.label_efficiency", "segmentation.evaluation.draws"),
    ),
    "preparation.duplicates": ("images.duplicates",),
    "segmentation.setup": ("networks.trained", "segmentation.training.job"),
}
_PACKAGE = "guided_diffusion"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Builds a module that looks its names up where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix(f"{_PACKAGE}.") not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        places = MOVED[module.__name__.removeprefix(f"{_PACKAGE}.")]
        new = [f"{_PACKAGE}.{place}" for place in places]
        text = f"{module.__name__} has moved to {' and '.join(new)}"
        warnings.warn(text, DeprecationWarning, stacklevel=2)

        def find(name: str) -> Any:
            for place in map(importlib.import_module, new):
                if hasattr(place, name):
                    return getattr(place, name)
            if name == "load_pretrained" and "networks.trained" in places:
                return _load_pretrained
            raise AttributeError(f"{text}; neither there nor here is {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


def _load_pretrained(path: str, given: Mapping[str, Any]) -> Any:
    """0.1's name for reading a checkpoint that is fine-tuned."""
    trained = importlib.import_module(f"{_PACKAGE}.networks.trained")
    return trained.read_trained(path, given, for_tuning=True)


def install() -> None:
    """Let `import` find moved modules, after everything that exists."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
