"""A network packed into a folder, and used from there."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_DIFFUSION, draw_pairs
from finetuning_util import folders
from golden_util import fill_parameters
from mask_diffusion_util import build, config_of
from safetensors.torch import load_file, save_file
from test_bad_inputs import refused

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import packed
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference import onnx_export
from guided_diffusion.segmentation.inference.predictor import load_predictor
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model, save_model
from guided_diffusion.segmentation.networks.mask_diffusion import describe
from guided_diffusion.segmentation.networks.union import join

READING, CLASSES = ReadingConfig(16, 1, resize="pad"), generic_categories(3)
UNET = SegmentationConfig(
    *(TINY, READING, CLASSES), timestep=30.7, flip_swaps=((1, 2),), diffusion=TINY_DIFFUSION
)
SMP = SegmentationConfig(
    *(None, READING, CLASSES),
    kind="smp",
    options={"encoder": "resnet18", "statistics": [[0.1, 0.2, 1 / 3], [0.2, 0.3, 0.7]]},
)


def save_unet(path):
    save_model(
        path, UNET, fill_parameters(UNET.build()).state_dict(), origin={"train": "/patients"}
    )


def save_smp(path):
    pytest.importorskip("segmentation_models_pytorch")
    save_model(path, SMP, SMP.build().state_dict())


def save_union(path):
    pytest.importorskip("segmentation_models_pytorch")
    states = [(c, fill_parameters(c.build()).state_dict()) for c in (UNET, SMP)]
    save_model(path, *join(states))


def save_mask_diffusion(path):
    config = describe(config_of(3), TINY_DIFFUSION, READING, CLASSES)
    save_model(path, config, build(3).state_dict())


@pytest.fixture
def model(tmp_path):
    save_unet(str(tmp_path / "segm.pth"))
    return tmp_path / "segm.pth"


@pytest.fixture
def shared(script, model, tmp_path):
    """A packed model, and radiographs in IMG."""
    draw_pairs(tmp_path, 2)
    assert script("pack_model.py", "segm.pth", "shared").code == 0
    return tmp_path / "shared"


@pytest.mark.parametrize("save", [save_unet, save_smp, save_union, save_mask_diffusion])
def test_predictions_are_identical_to_the_bit(script, tmp_path, save):
    draw_pairs(tmp_path, 1)
    save("segm.pth")
    assert script("pack_model.py", "segm.pth", "a b/ü").code == 0
    assert sorted(os.listdir("a b/ü")) == ["README.md", "config.json", "model.safetensors"]
    one, other = load_predictor("segm.pth"), load_predictor("a b/ü")
    path = str(tmp_path / "IMG/r0.png")
    assert np.array_equal(one.probabilities(path), other.probabilities(path))
    assert one.config == other.config
    weights = th.load("segm.pth", weights_only=True)["state_dict"]
    there = load_file("a b/ü/model.safetensors")
    assert weights.keys() == there.keys()
    assert all(th.equal(weights[name], there[name]) for name in weights)


class TestPretrained:
    def test_a_network_is_identical_to_the_bit(self, script, pretrained):
        assert script("pack_model.py", pretrained, "net").code == 0
        one, other = read_trained(str(pretrained), {}), read_trained("net", {})
        images, steps = th.randn(2, 1, 16, 16), th.tensor([3.0, 17.0])
        with th.no_grad():
            expected = one.network("cpu")(images, steps)
            assert th.equal(other.network("cpu")(images, steps), expected)
        assert (one.diffusion, one.reading) == (other.diffusion, other.reading)

    def test_commands_take_it(self, script, pretrained, split, tmp_path):
        assert script("pack_model.py", pretrained, "net").code == 0
        tune = ("finetune.py", "net/", *folders(split), "--epochs", 1)
        assert script(*tune).code == 0
        assert "nothing to do" in script(*tune).out
        assert script("image_sample.py", "--model_path", "net/", "--num_samples", 1).code == 0
        assert (tmp_path / "samples").is_dir()
        assert len(os.listdir("net")) == 3

    def test_other_weights_in_the_folder_are_another_run(self, script, pretrained, split):
        assert script("pack_model.py", pretrained, "net").code == 0
        tune = ("finetune.py", "net", *folders(split), "--epochs", 1)
        assert script(*tune).code == 0
        config = json.loads(Path("net/config.json").read_text())
        weights = {name: 2 * tensor for name, tensor in load_file("net/model.safetensors").items()}
        del config["weights"]
        packed.write("net", config, weights)
        refused(script(*tune), "checkpoint")

    def test_without_its_configuration(self, script, pretrained):
        (pretrained.parent / "config.json").unlink()
        refused(script("pack_model.py", pretrained, "net"), "has no config.json beside it")
        assert not os.path.exists("net")


class TestCommands:
    def test_prediction_and_evaluation(self, script, shared):
        assert script("predict.py", "shared", "IMG", "out").code == 0
        assert script("predict.py", "shared,segm.pth", "IMG", "out2").code == 0
        flags = ("--model", "shared", "--bootstrap", 20, "-o", "evaluation")
        assert script("evaluate.py", "IMG", "MASK", *flags).code == 0
        compare = ("--compare", "shared", "segm.pth", "-o", "comparison")
        assert script("evaluate.py", "IMG", "MASK", *compare).code == 0
        assert script("pack_model.py", "shared", "again", "--evaluation", "evaluation").code == 0
        card = Path("again/README.md").read_text()
        metrics = json.loads(Path("evaluation/metrics.json").read_text())
        assert "On 2 images" in card
        assert f"| class 1 | {metrics['per_class']['class 1']['dice']:.3f} |" in card
        one, other = (load_file(f"{name}/model.safetensors") for name in ("shared", "again"))
        assert all(th.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize(
        ("name", "written"),
        [("a/v1.2/", "a/v1.2.onnx"), ("hf://user/net", "net.onnx"), ("a.pth", "a.onnx")],
    )
    def test_onnx_stands_beside_the_folder(self, script, tmp_path, monkeypatch, name, written):
        (tmp_path / "a/v1.2").mkdir(parents=True)
        asked = []
        monkeypatch.setattr(onnx_export, "export", lambda *paths: asked.append(paths) or {})
        assert script("export_onnx.py", name).code == 0
        assert asked == [(name, written)]

    def test_nothing_of_the_training_data_is_shared(self, shared):
        text = "".join((shared / name).read_text() for name in ("config.json", "README.md"))
        assert "patients" not in text.replace("Patients apart", "").replace("other patients", "")
        assert "origin" not in json.loads((shared / "config.json").read_text())

    def test_nothing_is_overwritten(self, script, shared):
        refused(script("pack_model.py", "segm.pth", "shared"), "exists already")
        refused(script("pack_model.py", "segm.pth", "segm.pth"), "a file is in the way")
        refused(script("pack_model.py", "nowhere.pth", "new"), "nowhere.pth is missing")
        metrics = ("--evaluation", "IMG")
        refused(script("pack_model.py", "segm.pth", "new", *metrics), "IMG/metrics.json")
        assert not os.path.exists("new")


class TestBadFolders:
    def test_without_config(self, script, shared):
        (shared / "config.json").unlink()
        refused(script("predict.py", "shared", "IMG", "out"), "shared lacks config.json")

    def test_without_weights(self, script, shared):
        (shared / "model.safetensors").unlink()
        ended = script("predict.py", "shared", "IMG", "out")
        refused(ended, "shared is a folder", "model.safetensors")

    def test_truncated_or_changed(self, script, shared):
        path = shared / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-100])
        refused(script("predict.py", "shared", "IMG", "out"), "is damaged", "instead of")
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(script("predict.py", "shared", "IMG", "out"), "its checksum differs")
        assert not os.path.exists("out")

    def test_of_another_package(self, script, shared):
        (shared / "config.json").write_text('{"model_type": "segformer"}')
        save_file({"x": th.zeros(2)}, shared / "model.safetensors")
        refused(script("predict.py", "shared", "IMG", "out"), "shared describes no network of this")
        (shared / "config.json").write_text("[]")
        refused(script("predict.py", "shared", "IMG", "out"), "config.json holds no sections")

    def test_weights_of_another_network(self, script, shared):
        config = json.loads((shared / "config.json").read_text())
        packed.write(str(shared), config, {"x": th.zeros(2)})
        refused(script("predict.py", "shared", "IMG", "out"), "shared holds weights of another")

    def test_no_file_of_weights_at_all(self, script, shared):
        (shared / "model.safetensors").write_bytes(b"pickle")
        config = json.loads((shared / "config.json").read_text())
        fingerprint = packed.file_fingerprint(str(shared / "model.safetensors"))
        (shared / "config.json").write_text(json.dumps({**config, "weights": fingerprint}))
        refused(script("predict.py", "shared", "IMG", "out"), "is not a readable file of weights")

    def test_for_another_use(self, script, shared, pretrained, split):
        refused(script("finetune.py", "shared", *folders(split)), "segmentation model already")
        assert script("pack_model.py", pretrained, "net").code == 0
        refused(script("predict.py", "net", "IMG", "out"), "net is not a segmentation model")


class TestHub:
    REVISION = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cache(self, shared, tmp_path, monkeypatch):
        """The Hub's cache with the packed model, while there is no network."""
        constants = pytest.importorskip("huggingface_hub.constants")
        place = tmp_path / "cache/models--user--net"
        shutil.copytree(shared, place / "snapshots" / self.REVISION)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(self.REVISION)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        packed._download.cache_clear()
        yield place
        packed._download.cache_clear()

    def test_prediction(self, script, cache, tmp_path):
        assert script("predict.py", "hf://user/net", "IMG", "out").code == 0
        assert script("predict.py", "segm.pth", "IMG", "out2").code == 0
        for name in ("r0.png", "r1.png"):
            assert (tmp_path / "out/MASK" / name).read_bytes() == (
                tmp_path / "out2/MASK" / name
            ).read_bytes()
        assert load_model(f"hf://user/net@{self.REVISION}")[1] == load_model("segm.pth")[1]

    def test_refused(self, script, cache):
        for name, said in (
            ("hf://user/other", "hf://user/other is not in the local cache"),
            ("hf://user/net@v2", "hf://user/net@v2 is not in the local cache"),
            ("hf://user", "expected hf://USER/REPO"),
            ("hf://../../etc", "expected hf://USER/REPO"),
        ):
            refused(script("predict.py", name, "IMG", "out"), said)
        (cache / "snapshots" / self.REVISION / "model.safetensors").unlink()
        refused(script("predict.py", "hf://user/net", "IMG", "out"), "holds no model.safetensors")
        assert not os.path.exists("out")

    @pytest.mark.parametrize(
        ("status", "said"), [(404, "it does not exist, or is private"), (500, "downloaded: sorry")]
    )
    def test_what_the_hub_refuses(self, script, cache, monkeypatch, status, said):
        hub, errors = map(importlib.import_module, ("huggingface_hub", "huggingface_hub.errors"))

        class Refusal(errors.HfHubHTTPError):
            response = SimpleNamespace(status_code=status)

            def __init__(self):
                pass

            def __str__(self):
                return "sorry"

        def refuse(*arguments, **options):
            raise Refusal

        monkeypatch.setattr(hub, "snapshot_download", refuse)
        ended = script("predict.py", "hf://user/net", "IMG", "out")
        refused(ended, "hf://user/net cannot be downloaded", said)

    def test_without_its_package(self, script, cache, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        refused(script("predict.py", "hf://user/net", "IMG", "out"), "pip install '.[hub]'")
        assert script("predict.py", "shared", "IMG", "out").code == 0

    def test_nothing_is_downloaded_for_a_local_name(self, monkeypatch, shared):
        def refuse(path):
            raise AssertionError(path)

        monkeypatch.setattr(packed, "_download", refuse)
        load_model("shared")
        with pytest.raises(UserError, match="missing"):
            load_model("user/net")
