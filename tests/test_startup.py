"""Commands answer --help and wrong flags before they import what only their work needs."""

import json
import subprocess
import sys

import pytest
from commands_util import all_commands, path_of
from conftest import TINY, draw_pairs

from guided_diffusion import unet
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks import config as networks
from guided_diffusion.networks import precision
from guided_diffusion.preparation import config as preparation
from guided_diffusion.runtime.command_line import precision_flag
from guided_diffusion.sampling import config as sampling
from guided_diffusion.sampling import features, solvers
from guided_diffusion.segmentation.annotations.reading import formats
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model

SLOW = (
    *("torch", "torchvision", "monai", "matplotlib", "scipy", "pydicom", "tensorboard"),
    *("pandas", "gradio", "onnx", "segmentation_models_pytorch", "wandb", "huggingface_hub"),
    *("shapely", "pycocotools", "nibabel", "nrrd", "highdicom", "safetensors"),
)
# runs a command for each list of arguments; writes the exit codes and the modules to a file
RUN = """
import json, os, runpy, sys

script, said, *lists = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
codes = []
for words in lists:
    sys.argv = [script, *json.loads(words)]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        codes.append(end.code)
with open(said, "w") as file:
    json.dump([codes, sorted(sys.modules)], file)
"""


def run(name, folder, *lists):
    """Exit codes of a command for several lists of arguments, and the slow modules imported."""
    words = [json.dumps(list(map(str, one))) for one in lists]
    command = [sys.executable, "-c", RUN, path_of(name), folder / "said.json", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    codes, modules = json.loads((folder / "said.json").read_text())
    return codes, [name for name in SLOW if name in modules], done


@pytest.mark.parametrize("name", all_commands())
def test_flags_are_parsed_without_slow_imports(name, tmp_path):
    texts = (["--help"], ["--help-all"], ["--version"])
    codes, slow, done = run(name, tmp_path, *texts, ["--no_such_flag", "1"])
    assert codes == [0, 0, 0, 2], done.stderr
    assert slow == []
    assert done.stdout.startswith("usage:")
    assert done.stderr.startswith("error:")


def test_a_mask_is_predicted_without_what_it_does_not_use(tmp_path):
    images, config = (
        tmp_path / "images",
        SegmentationConfig(TINY, ReadingConfig(16, 1), generic_categories(3)),
    )
    draw_pairs(images, 1)
    save_model(str(tmp_path / "segm.pth"), config, config.build().state_dict())
    arguments = tmp_path / "segm.pth", images / "IMG", tmp_path / "results"
    codes, slow, done = run("predict.py", tmp_path, arguments)
    assert codes == [0], done.stderr
    assert slow == ["torch"]
    assert (tmp_path / "results" / "MASK" / "r0.png").is_file()
    assert (tmp_path / "results" / "report.html").is_file()


def test_choices_are_those_of_the_work():
    """Flags list what modules that they must not import can do."""
    assert set(precision_flag.NAMES) == set(precision.PRECISIONS)
    assert list(sampling.TRAITS) == list(solvers.SAMPLERS)
    assert (*features.TORCHVISION, "ddpm") == sampling.FEATURES
    assert networks.NORMS == unet.NORMS
    assert (*formats.FORMATS, "colours") == preparation.ANNOTATION_FORMATS
