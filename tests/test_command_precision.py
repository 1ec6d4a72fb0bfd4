"""--precision in every command: its default by processor, and what a resumed run does."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import test_legacy_files
import torch as th
from commands_util import COMMANDS, all_commands, arguments, prepare_commands
from conftest import digests
from PIL import Image
from test_flag_values import flags_of, parser_of
from test_legacy_files import legacy  # noqa: F401 - a fixture
from torch.nn.modules.module import register_module_forward_hook

from guided_diffusion.networks import precision
from guided_diffusion.runtime.storage.files import read_json
from guided_diffusion.segmentation.inference import serve, visits
from guided_diffusion.segmentation.metrics import confusion_matrix, dice_iou
from guided_diffusion.segmentation.training import loop

WITHOUT_NETWORK = {
    *("prepare_data.py", "rgb2tif.py", "import_labels.py", "export_labels.py", "pack_model.py"),
}
# their figures are compared between machines
ALWAYS_FP32 = {"image_nll.py", "evaluate_samples.py"}
# as are the probe's, which is always float32
COMPUTING = sorted(set(all_commands()) - WITHOUT_NETWORK - {"export_onnx.py", "probe.py"})
# a warning, which is shown all the same
ONE_PATIENT = (
    "warning: nothing tells which images are of one patient, so each counts as a patient of its"
    " own; if a patient has several, scores on VAL will be too high\n"
)
SAYS_DEFAULT = "precision bf16: this processor computes it faster than fp32; --precision fp32"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return prepare_commands(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def run(script, workshop, monkeypatch):
    """Runs a command of COMMANDS: what it said, and the types that its convolutions computed in."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("OPENAI_LOGDIR", "out")
    at_once = SimpleNamespace(Event=lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(serve, "threading", at_once)  # serve.py would wait for Ctrl-C
    monkeypatch.setattr(serve, "served", serves_one)
    known = set(os.listdir())

    def call(name, *flags):
        types = set()

        def note(module, inputs, output):
            if isinstance(module, th.nn.Conv2d):
                types.add(output.dtype)

        hook = register_module_forward_hook(note)
        try:
            ended = script(name, *arguments(name, "out"), *flags)
        finally:
            hook.remove()
            for left in set(os.listdir()) - known:
                (shutil.rmtree if os.path.isdir(left) else os.remove)(left)
        assert ended.code == 0, ended.err
        assert ("--quiet" in flags) <= (not ended.err.replace(ONE_PATIENT, ""))
        assert ended.out
        return ended.out + ended.err, types

    return call


class serves_one:
    """A page on which one radiograph is segmented."""

    def __init__(self, predictor, *_):
        self.predictor = predictor

    def __enter__(self):
        visits.page_for(self.predictor, "TRAIN/IMG/r0.png")
        return "nowhere"

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", COMPUTING)
def test_the_flag_is_the_same_everywhere(name):
    (flag,) = (action for action in flags_of(name) if action.dest == "precision")
    assert flag.choices == ("", "auto", "fp32", "fp16", "bf16")
    assert parser_of(name).defaults["precision"] == ("fp32" if name in ALWAYS_FP32 else "")
    assert "bf16 on a CPU that computes it faster than fp32" in flag.help


@pytest.mark.parametrize("name", COMPUTING)
def test_bfloat16_where_the_processor_has_units_for_it(run, monkeypatch, name):
    monkeypatch.setattr(precision, "computes_bf16_faster", lambda: True)
    said, types = run(name)
    if name in ALWAYS_FP32:
        assert (types, SAYS_DEFAULT in said) == ({th.float32}, False)
        said, types = run(name, "--precision", "auto")
    assert th.bfloat16 in types
    assert said.count(SAYS_DEFAULT) == 1
    said, types = run(name, "--precision", "fp32")
    assert types == {th.float32}
    assert "precision bf16" not in said


@pytest.mark.parametrize("name", COMPUTING)
def test_float32_elsewhere_and_only_results_if_quiet(run, name):
    said, types = run(name, "--quiet")
    assert types == {th.float32}
    assert "precision bf16" not in said


@pytest.mark.parametrize(
    "name", ["predict.py", "evaluate.py", "image_sample.py", "label_efficiency.py", "image_nll.py"]
)
def test_float16_on_a_cpu_is_refused_outside_training(script, workshop, monkeypatch, name):
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "cpu")
    before = digests(workshop)
    ended = script(name, *arguments(name, "out"), "--precision", "fp16")
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
    assert "--precision fp16 needs a GPU of CUDA: use bf16 or fp32" in ended.err
    assert digests(workshop) == before


class TestPretraining:
    FLAGS = (*COMMANDS["image_train.py"].split(), "--save_interval", 2, "--max_steps")

    @pytest.fixture
    def train(self, script, workshop, monkeypatch, tmp_path):
        """Trains in a folder up to a step, with or without units."""

        def call(folder, steps, units, *flags):
            monkeypatch.chdir(workshop)
            monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / folder))
            monkeypatch.setattr(precision, "computes_bf16_faster", lambda: units)
            ended = script("image_train.py", *self.FLAGS, steps, *flags)
            return ended, json.loads((tmp_path / folder / "config.json").read_text())

        return call

    def test_goes_on_in_the_precision_it_began_with(self, train, tmp_path):
        """Also on another processor, and exactly as if it had not stopped."""
        train("whole", 4, True)
        ended, config = train("parts", 2, True)
        assert (config["training"]["precision"], SAYS_DEFAULT in ended.err) == ("bf16", True)
        ended, config = train("parts", 4, False)
        assert ended.code == 0, ended.err
        assert (config["training"]["precision"], config["history"]) == ("bf16", [])
        assert "precision bf16, in which this began: this processor gains little or" in ended.err
        one, two = ((tmp_path / k / "model000004.pt").read_bytes() for k in ("whole", "parts"))
        assert one == two
        train("other", 2, False)
        ended, config = train("other", 4, True)
        assert (config["training"]["precision"], "precision bf16" in ended.err) == ("fp32", False)
        assert (tmp_path / "other" / "model000004.pt").read_bytes() != one

    def test_another_one_is_logged_and_recorded(self, train):
        train("run", 2, True)
        ended, config = train("run", 4, True, "--precision", "fp32")
        assert "changed at step 2: precision 'fp32' instead of 'bf16'" in ended.err
        assert config["training"]["precision"] == "fp32"
        assert [entry["step"] for entry in config["history"]] == [2]
        ended, config = train("run", 6, True)
        assert (config["training"]["precision"], len(config["history"])) == ("fp32", 1)

    @pytest.mark.parametrize("use_fp16", [False, True])
    def test_a_run_without_a_stored_one_is_float32(self, train, tmp_path, use_fp16):
        flags = ("--use_fp16", use_fp16, "--precision", "fp32")
        train("whole", 4, False, *flags)
        _, config = train("run", 2, False, *flags)
        config["training"]["precision"] = ""
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        ended, config = train("run", 4, True, "--use_fp16", use_fp16)
        assert ended.code == 0, ended.err
        assert config["history"] == []
        said = "float16 needs CUDA: training in float32 on the CPU" in ended.err
        assert said == use_fp16
        one, two = ((tmp_path / k / "model000004.pt").read_bytes() for k in ("whole", "run"))
        assert one == two

    def test_a_complete_run_stays_complete(self, train):
        train("run", 2, True)
        ended, config = train("run", 2, False)
        assert (ended.code, config["history"]) == (0, [])
        ended, _ = train("run", 2, False, "--precision", "fp32")
        assert (ended.code, "complete run of 2 steps" in ended.err) == (2, True)


def test_a_fine_tuning_goes_on_in_the_precision_it_began_with(
    script, workshop, monkeypatch, tmp_path
):
    monkeypatch.chdir(workshop)

    def run(name, units, *flags):
        monkeypatch.setattr(precision, "computes_bf16_faster", lambda: units)
        line = arguments("finetune.py", str(tmp_path / name))
        return script("finetune.py", *line, "--epochs", 2, *flags)

    save = loop.Finetuner.save

    def save_and_crash(self):
        save(self)
        raise KeyboardInterrupt

    ended = run("whole", True)
    assert (ended.code, SAYS_DEFAULT in ended.err + ended.err) == (0, True)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY", -1.0)
        patch.setattr(loop.Finetuner, "save", save_and_crash)
        assert run("parts", True).code == 130
    ended = run("parts", False, "--precision", "fp32")
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1)
    assert "precision 'fp32' instead of 'bf16'" in ended.err
    ended = run("parts", False)
    assert ended.code == 0, ended.err
    assert "precision bf16, in which this began" in ended.err + ended.err
    one, two = (th.load(tmp_path / f"{name}_last.pth") for name in ("whole", "parts"))
    assert one["origin"]["precision"] == two["origin"]["precision"] == "bf16"
    assert all(th.equal(one["state_dict"][k], two["state_dict"][k]) for k in one["state_dict"])
    assert "complete" in run("parts", False).out


def test_runs_of_older_versions_go_on_in_float32(script, legacy, monkeypatch, bf16_units):  # noqa: F811
    """With the figures that those versions would have reached."""
    test_legacy_files.test_a_pretraining_run_resumes_as_it_would_have_gone_on(
        script, legacy, monkeypatch
    )
    assert script("finetune.py", *test_legacy_files.FINETUNING).code == 0
    saved = th.load("stopped_last.pth")
    assert saved["origin"]["precision"] == "fp32"
    expected = test_legacy_files.weights(legacy / "resumed.pth")
    found = test_legacy_files.weights(legacy / "stopped.pth")
    key = "input_blocks.1.0.in_layers.2.weight"
    th.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


class TestSampling:
    def sample(self, script, units, monkeypatch, *flags):
        monkeypatch.setattr(precision, "computes_bf16_faster", lambda: units)
        line = arguments("image_sample.py", "folder")
        return script("image_sample.py", *line, "--num_samples", 2, *flags)

    @pytest.mark.parametrize("units", [True, False])
    def test_missing_images_are_of_the_folders_precision(
        self, script, workshop, monkeypatch, tmp_path, units
    ):
        monkeypatch.chdir(shutil.copytree(workshop, tmp_path / "copy"))
        ended = self.sample(script, units, monkeypatch)
        assert ended.code == 0, ended.err
        record = read_json("folder/sampling.json")
        # absent in float32, as in folders of older versions
        assert record["images"].get("precision") == ("bf16" if units else None)
        before = digests(tmp_path / "copy" / "folder")
        os.remove("folder/png/000001.png")
        ended = self.sample(script, not units, monkeypatch)
        assert ended.code == 0, ended.err
        assert digests(tmp_path / "copy" / "folder") == before
        other = "fp32" if units else "bf16"
        ended = self.sample(script, units, monkeypatch, "--precision", other)
        assert (ended.code, "holds images of another command (precision" in ended.err) == (2, True)


def test_a_comparison_keeps_its_precision(script, workshop, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(workshop, tmp_path / "copy"))

    def compare(units, *flags):
        monkeypatch.setattr(precision, "computes_bf16_faster", lambda: units)
        return script("label_efficiency.py", *arguments("label_efficiency.py", "out"), *flags)

    ended = compare(True)
    assert (ended.code, SAYS_DEFAULT in ended.err) == (0, True), ended.err
    ended = compare(False, "--seeds", "0,1")
    assert ended.code == 0, ended.err
    assert "precision bf16, in which this began" in ended.err
    results = [read_json(f"out/runs/plain_k1_seed{k}/result.json") for k in (0, 1)]
    for result in results:
        assert result["precision"] == "bf16"
        assert all("--precision bf16" in command for command in result["commands"])
    ended = compare(True, "--precision", "fp32")
    assert (ended.code, "--precision 'fp32' instead of 'bf16'" in ended.err) == (2, True), ended.err


def test_a_comparison_of_an_older_version_goes_on_in_float32(
    script, workshop, monkeypatch, tmp_path, bf16_units
):
    monkeypatch.chdir(shutil.copytree(workshop, tmp_path / "copy"))
    line = arguments("label_efficiency.py", "out")
    assert script("label_efficiency.py", *line, "--precision", "fp32").code == 0
    path = "out/runs/plain_k1_seed0/result.json"
    result = read_json(path)
    for origin in (True, False):  # older, and still older
        del result["precision" if origin else "origin"]
        if origin:
            del result["origin"]["settings"]["precision"]
            result["commands"] = [c.replace(" --precision fp32", "") for c in result["commands"]]
        with open(path, "w") as file:
            json.dump(result, file)
        ended = script("label_efficiency.py", *line)
        assert (ended.code, "precision bf16" in ended.err) == (0, False), ended.err


def test_predictions_in_bfloat16_agree_with_float32(script, phantoms, tmp_path):
    """Of a small network that has learnt something: 99.5 % of pixels, Dice to 0.005."""
    folders = [phantoms / part / kind for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK")]
    network = "--num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --num_head_channels 16"
    flags = f"--network unet --image_size 32 {network} --attention_resolutions 8 --steps 40"
    flags += " --epochs 4 --weights_save segm.pth"
    ended = script("baseline_train.py", *folders[:2], *flags.split())
    assert ended.code == 0, ended.err
    masks = {"true": folders[3]}
    for name in ("fp32", "bf16"):
        ended = script("predict.py", "segm.pth", folders[2], name, "--precision", name)
        assert ended.code == 0, ended.err
        masks[name] = tmp_path / name / "MASK"
    true, full, half = (
        np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
        for folder in masks.values()
    )
    assert true.shape == full.shape == half.shape
    classes = int(true.max()) + 1
    dice, half_dice = (
        dice_iou(confusion_matrix(found, true, classes)).mean_dice() for found in (full, half)
    )
    assert dice > 0.3
    assert (full == half).mean() >= 0.995
    assert abs(dice - half_dice) <= 0.005
