"""`--dry_run` and `--compile` of image_train.py."""

import re

import pytest
import torch as th
from conftest import TINY, draw_pairs

FLAGS = """
    --image_size 16 --num_channels 32 --num_res_blocks 1 --num_head_channels 16 --channel_mult 1,2
    --attention_resolutions 8 --learn_sigma True --resblock_updown True --diffusion_steps 50
""".split()  # noqa: SIM905 - as on a command line


@pytest.mark.parametrize("more", [[], ["--microbatch", "2"], ["--class_cond", "True"]])
def test_dry_run_tells_and_writes_nothing(script, tmp_path, more):
    draw_pairs(tmp_path / "data", 2)
    before = sorted(tmp_path.rglob("*"))
    data = ["--data_dir", tmp_path / "data" / "IMG", "--batch_size", "4", "--dry_run", "True"]
    ended = script("image_train.py", *FLAGS, *data, *more)
    assert ended.code == 0, ended.err
    assert sorted(tmp_path.rglob("*")) == before
    if "--class_cond" not in more:
        count = sum(p.numel() for p in TINY.build().parameters())
        assert f"{count / 1e6:.2f} million parameters" in ended.out
    for unit in ("teraFLOP per step of 4 images", "GiB of memory", "seconds per step"):
        assert unit in ended.out


def test_the_global_batch_counts(script):
    ended = script("image_train.py", *FLAGS, "--global_batch_size", "3", "--dry_run")
    assert ended.code == 0, ended.err
    assert "per step of 3 images" in ended.out


def test_trainers_that_cannot_refuse_it(script):
    for name in ("super_res_train.py", "classifier_train.py"):
        ended = script(name, "--dry_run")
        assert ended.code == 2
        assert "--dry_run" in ended.err


def test_guided(script):
    flags = ["--segmentation_guided", "True", "--num_segmentation_classes", "3", "--dry_run"]
    ended = script("image_train.py", *FLAGS, *flags)
    assert ended.code == 0, ended.err
    assert re.search(r"[\d.]+ seconds per step", ended.out)


def test_the_network_is_one_graph():
    """Without breaks, whatever compiles it, with recomputed activations as well."""
    for recompute in (False, True, "norms"):
        model = TINY.build()
        for module in model.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = recompute
        x, steps = th.randn(2, 1, 16, 16), th.tensor([3, 40])
        th.nn.init.normal_(model.out[-1].weight)
        expected = model(x, steps)
        names = list(model.state_dict())
        model.compile(fullgraph=True, backend="eager")
        th.testing.assert_close(model(x, steps), expected)
        model(x, steps).mean().backward()
        assert list(model.state_dict()) == names
