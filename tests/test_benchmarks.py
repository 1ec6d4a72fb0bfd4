"""The benchmarks run to completion and count operations correctly; timings are not judged."""

import json
import sys

import numpy as np
import pytest
import torch as th
from conftest import ROOT, draw_pairs
from kernels_util import needs_kernels

from guided_diffusion.kernels import library
from guided_diffusion.networks.operations import count_operations

sys.path.insert(0, str(ROOT / "benchmarks"))
import measuring
import peers

TINY = """
    --image_size 16 --in_channels 1 --num_channels 32 --num_res_blocks 1 --num_head_channels 16
    --channel_mult 1,2 --attention_resolutions 8 --use_fp16 True --precision fp32 --threads 1
""".split()  # noqa: SIM905 - as on a command line


@pytest.fixture(autouse=True)
def small_matrix_product(monkeypatch):
    """A matrix product that takes no time."""

    def matrix_product(precision, device):
        left = th.randn(8, 8)
        return measuring.Case("product", lambda: left @ left, 2 * 8**3, precision)

    monkeypatch.setattr(measuring, "matrix_product", matrix_product)


def test_count_of_operations():
    conv = th.nn.Conv2d(3, 4, 3, padding=1, device="meta")
    forward = 2 * 4 * 3 * 9 * 8 * 8
    assert count_operations(lambda: conv(th.empty(1, 3, 8, 8))) == forward

    def attention():
        q, k, v = (th.empty(1, 2, 16, 8).requires_grad_() for _ in range(3))
        th.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    assert count_operations(attention) == 6 * 2 * 2 * 16 * 16 * 8


@pytest.mark.parametrize(
    ("name", "more", "cases"),
    [
        ("train_step.py", ["--rounds", "1", "--peer", "none", "--recompute", "norms,True"], 5),
        ("inference.py", ["--rounds", "1", "--peer", "none", "--batch_sizes", "1,2"], 4),
        ("sampling.py", ["--rounds", "1", "--samplers", "ddim:2,heun:2"], 2),
    ],
)
def test_they_run(script, tmp_path, monkeypatch, name, more, cases):
    monkeypatch.setattr(measuring, "peak_memory", lambda arguments: 1e9)
    ended = script(name, *TINY, *more, "--json", tmp_path / "out.json")
    assert ended.code == 0, ended.err
    values = json.loads((tmp_path / "out.json").read_text())
    assert len(values["lines"]) == cases
    for line in values["lines"]:
        rate = line["operations"] / line["seconds"]
        assert line["share_of_matrix_rate"] == pytest.approx(rate / values["rates"]["fp32"])
    assert all(line["case"] in ended.out for line in values["lines"])


@needs_kernels
def test_kernels_against_torch(script, tmp_path):
    flags = ["--rounds", "1", "--batch_size", "1", "--precision", "fp32"]
    flags += ["--json", tmp_path / "out.json"]
    ended = script("layers.py", *flags)
    assert ended.code == 0, ended.err
    lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert [line["precision"] for line in lines] == ["fp32"] * 11
    assert all(line["name"] in ended.out and line["kernels"] > 0 for line in lines)


def test_without_kernels_there_is_nothing_to_compare(script, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: None)
    ended = script("layers.py")
    assert ended.code == 2
    assert "AVX-512" in ended.err


def test_end_to_end(script, tmp_path):
    draw_pairs(tmp_path / "data", 4)
    flags = [*TINY[:2], *TINY[4:]]
    more = ["--batch_size", "2", "--steps", "2", "--num_workers", "0", "--cache", "none"]
    ended = script("end_to_end.py", tmp_path / "data" / "IMG", *flags, *more)
    assert ended.code == 0, ended.err
    assert "waiting for data" in ended.out


def test_a_profile_names_the_slowest_operations(script, tmp_path):
    flags = [*TINY, "--rounds", "1", "--peer", "none", "--batch_sizes", "1", "--sizes", "16"]
    ended = script("inference.py", *flags, "--profile", "4", "--json", tmp_path / "values.json")
    assert ended.code == 0, ended.err
    profiles = json.loads((tmp_path / "values.json").read_text())["profiles"]
    assert [len(lines) for lines in profiles.values()] == [4, 4]
    for lines in profiles.values():
        assert lines == sorted(lines, key=lambda line: -line["seconds"])
        assert all(line["name"][:100] in ended.out for line in lines)
        assert any("conv" in line["name"] for line in lines)


@pytest.mark.parametrize(
    ("device", "remedy"), [("gpu", "cpu, cuda"), ("cuda", "CPU"), ("cuda:1", "CPU")]
)
def test_a_missing_device(script, monkeypatch, device, remedy):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    ended = script("train_step.py", "--device", device)
    assert ended.code == 2
    assert f"--device {device}: " in ended.err
    assert remedy in ended.err


def test_without_a_gpu_the_cpu_is_measured_and_named(monkeypatch, capsys):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    assert measuring.resolve_device("").type == "cpu"
    assert "no GPU found" in capsys.readouterr().out


def test_another_checkout_as_a_peer(tmp_path):
    package = tmp_path / "guided_diffusion"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "unet.py").write_text(
        "import torch\n\n\nclass UNetModel(torch.nn.Linear):\n"
        "    def __init__(self, out_channels, **kwargs):\n"
        "        super().__init__(2, out_channels)\n"
    )
    before = sys.modules["guided_diffusion.unet"]
    network = peers.build_peer(str(tmp_path), measuring.REFERENCE, 5)
    assert network.out_features == 5
    assert sys.modules["guided_diffusion.unet"] is before
    assert str(tmp_path) not in sys.path


def test_the_diffusers_peer_has_the_same_widths():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    with th.device("meta"):
        theirs = peers.build_peer("diffusers", measuring.REFERENCE, 3)
        ours = measuring.REFERENCE.build()
    sizes = [sum(p.numel() for p in network.parameters()) for network in (theirs, ours)]
    assert np.isclose(*sizes, rtol=0.01)


def test_dry_run_against_a_run(script, tmp_path, monkeypatch):
    """Both figures of everything, from processes of their own."""
    monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    draw_pairs(tmp_path / "data", 4)
    flags = tmp_path / "flags.sh"
    flags.write_text(
        'MODEL_FLAGS="--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2"\n'
        'DIFFUSION_FLAGS="--diffusion_steps 50 --timestep_respacing 2"\n'
        'TRAIN_FLAGS="--batch_size 2"\n'
    )
    data = ["--data_dir", tmp_path / "data" / "IMG", "--json", tmp_path / "out.json"]
    ended = script("dry_run.py", flags, *data, "--steps", "3")
    assert ended.code == 0, ended.err
    (line,) = json.loads((tmp_path / "out.json").read_text())["lines"]
    for kind in ("predicted", "real"):
        assert set(line[kind]) == {"s per step", "s in all", "GiB", "MB saved"}
        assert all(value > 0 for value in line[kind].values())
    assert ended.out.count("flags.sh") == 4

    ended = script("dry_run.py", tmp_path / "none.sh")
    assert ended.code == 2
    assert "none.sh sets no flags" in ended.err
