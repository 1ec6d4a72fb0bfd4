"""ONNX: the same numbers as the network at any size, and the metadata to use them."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch as th
from conftest import TINY
from golden_util import fill_parameters

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.inference import onnx_export
from guided_diffusion.segmentation.model_file import SegmentationConfig, load_model, save_model
from guided_diffusion.segmentation.networks import union


def save(folder):
    config = SegmentationConfig(
        dataclasses.replace(TINY, channel_mult="1", attention_resolutions=""),
        ReadingConfig((16, 24), 1, "pad"),
        generic_categories(3),
        timestep=7.0,
    )
    network = fill_parameters(config.build())
    save_model(str(folder / "segm.pth"), config, network.state_dict())
    return str(folder / "segm.pth")


def check(path, sizes):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path.replace(".pth", ".onnx"))
    model, _, _ = load_model(path)
    for size in sizes:
        images = th.rand(size[0], 1, *size[1:]) * 2 - 1
        found = session.run(None, {"radiographs": images.numpy()})[0]
        with th.no_grad():
            np.testing.assert_allclose(found, model(images).numpy(), atol=1e-4)
    return session.get_modelmeta().custom_metadata_map


def test_any_size_gives_the_networks_numbers(script, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    path = save(tmp_path)
    ended = script("export_onnx.py", path)
    assert ended.code == 0, ended.err
    assert "equal to 0.0001" in ended.out
    metadata = check(path, [(1, 16, 16), (4, 31, 17), (1, 1, 3), (2, 50, 64)])
    assert json.loads(metadata["timestep"]) == 7
    assert json.loads(metadata["geometry"]) == {"kind": "pad", "height": 16, "width": 24}
    assert json.loads(metadata["reading"])["image_size"] == [16, 24]
    assert [c["name"] for c in json.loads(metadata["categories"])] == [
        c.name for c in generic_categories(3)
    ]
    assert set(metadata) >= {"input", "output", "kind", "version"}


def test_a_union_gives_the_mean_of_its_networks(script, tmp_path):
    """Networks that pad to different multiples, and differ in their timestep."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    networks = []
    for mult, timestep in (("1", 7.0), ("1,2", 0.0)):
        model = dataclasses.replace(TINY, channel_mult=mult, attention_resolutions="")
        config = SegmentationConfig(
            model, ReadingConfig((16, 24), 1, "pad"), generic_categories(3), timestep=timestep
        )
        networks.append((config, fill_parameters(config.build()).state_dict()))
    path = str(tmp_path / "segm.pth")
    save_model(path, *union.join(networks))
    ended = script("export_onnx.py", path)
    assert ended.code == 0, ended.err
    metadata = check(path, [(1, 16, 16), (4, 31, 17), (2, 50, 64)])
    assert json.loads(metadata["kind"]) == "union"


def test_a_file_that_gives_other_numbers_is_not_written(tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = __import__("onnxruntime")
    image = pytest.importorskip("onnx")
    node = image.helper.make_node("Identity", ["radiographs"], ["scores"])
    shape = ["batch", 1, "height", "width"]
    places = [
        image.helper.make_tensor_value_info(name, image.TensorProto.FLOAT, shape)
        for name in ("radiographs", "scores")
    ]
    graph = image.helper.make_graph([node], "copy", places[:1], places[1:])
    content = image.helper.make_model(
        graph, opset_imports=[image.helper.make_opsetid("", 18)], ir_version=10
    ).SerializeToString()
    onnx_export._check(onnxruntime, content, lambda x: x, 1)
    with pytest.raises(UserError, match="differ by more than"):
        onnx_export._check(onnxruntime, content, lambda x: x + 2e-4, 1)


def test_what_cannot_be_exported_is_said(script, tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    path = save(tmp_path)
    values = th.load(path, weights_only=True)
    config = SegmentationConfig.from_plain({**values, "kind": "mask_diffusion"}, path)
    monkeypatch.setattr(onnx_export, "load_model", lambda path: (th.nn.Identity(), config, values))
    with pytest.raises(UserError, match="kind mask_diffusion cannot be exported"):
        onnx_export.export(path, str(tmp_path / "a.onnx"))
    assert not (tmp_path / "a.onnx").exists()


def test_a_missing_package_is_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ended = script("export_onnx.py", save(tmp_path))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "onnx" in ended.err
    assert "pip install '.[onnx]'" in ended.err


def test_the_baselines_network_has_its_own_scale(tmp_path, monkeypatch):
    """An smp network, of one layer here, takes standardised images in multiples of 32."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    config = SegmentationConfig(None, ReadingConfig(16, 1), generic_categories(3), kind="smp")
    model = th.nn.Module()
    model.network = th.nn.Conv2d(1, 3, 3, padding=1)
    model.mean, model.deviation = th.full((1, 1, 1), 0.4), th.full((1, 1, 1), 0.2)

    def forward(images):
        sides = images.shape[2:]
        pad = [0, -sides[1] % 32, 0, -sides[0] % 32]
        padded = th.nn.functional.pad(images, pad, mode="replicate")
        standard = ((padded + 1) / 2 - 0.4) / 0.2
        return model.network(standard)[..., : sides[0], : sides[1]]

    monkeypatch.setattr(model, "forward", forward, raising=False)
    monkeypatch.setattr(onnx_export, "load_model", lambda path: (model, config, {}))
    metadata = onnx_export.export("segm.pth", str(tmp_path / "a.onnx"))
    assert json.loads(metadata["timestep"]) is None
    assert (tmp_path / "a.onnx").exists()
