"""A pretraining begins from a trained network, of other images: --init_checkpoint."""

import dataclasses
import json
import re

import pytest
import torch as th
from sampling_util import CLASSES, DIFFUSION, NETWORK, write_shapes, write_trained

from guided_diffusion import dist_util
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.trained import read_trained
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint, run_lock
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import dry_run
from guided_diffusion.training.adapting import adapt, read_init, record_of_init
from guided_diffusion.training.config import PretrainConfig
from guided_diffusion.training.run import apply_flags, open_run

NEW = ("--sample_interval", 0, "--batch_size", 2, "--log_interval", 1, "--max_steps", 1)
SHAPELESS = ("--num_heads", 2, "--use_new_attention_order", "False")
PROCESS = ("--diffusion_steps", DIFFUSION.diffusion_steps, "--noise_schedule", "linear")


def network_of(channels: int, learn_sigma: bool, **more) -> ModelConfig:
    return dataclasses.replace(NETWORK, in_channels=channels, learn_sigma=learn_sigma, **more)


def adapted(path, classes=(), **flags) -> th.nn.Module:
    """The network that a run with these flags begins with."""
    init = read_init(str(path), flags, "diffusion")
    record = apply_flags(record_of_init(init, ModelConfig), ModelConfig, flags)
    record = dataclasses.replace(record, classes=tuple(classes))
    network = record.model.build()
    adapt(network, init, record)
    return network.eval()


@pytest.mark.parametrize(("before", "now"), [(3, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize("sigma", [(True, True), (True, False), (False, True), (False, False)])
def test_grey_images_get_the_same_prediction_with_other_channels(tmp_path, before, now, sigma):
    path = write_trained(tmp_path / "old", network_of(before, sigma[0]))
    old = read_trained(str(path), {}).network("cpu")
    new = adapted(path, in_channels=now, learn_sigma=sigma[1])
    grey, steps = th.randn(2, 1, 16, 16, generator=th.manual_seed(0)), th.tensor([3, 40])
    with th.no_grad():
        one, other = (
            network(grey.expand(-1, channels, -1, -1), steps)
            for network, channels in ((old, before), (new, now))
        )
    assert other.shape[1] == now * (1 + sigma[1])
    assert one.std() > 0.01
    parts = [part.mean(1) for part in one.split(before, dim=1)]
    found = [part.mean(1) for part in other.split(now, dim=1)]
    assert th.allclose(found[0], parts[0], atol=1e-5)
    if all(sigma):
        assert th.allclose(found[1], parts[1], atol=1e-5)
    elif sigma[1]:
        assert not found[1].any()


def test_the_first_loss_is_that_of_the_trained_network(tmp_path):
    images, path = write_shapes(tmp_path / "images"), write_trained(tmp_path / "old")
    flags = {"data_dir": str(images), "batch_size": 4, "init_checkpoint": str(path)}
    try:
        run = open_run(
            flags, "diffusion", ModelConfig, PretrainConfig, folder=str(tmp_path / "run")
        )
        networks = run.build(), read_trained(str(path), {}).network("cpu").requires_grad_(True)
        images, cond = next(run.batches(0))
        losses = []
        for network in networks:
            loop = run.loop(TrainLoop, network, run.batches)
            assert loop.step == 0
            losses.append(loop.losses(loop.model, images, cond, slice(0, 4))[2]["loss"])
            # the average begins with the same weights
            (average,) = loop.stepper.ema.values()
            assert all(map(th.equal, average, networks[1].parameters()))
        assert th.equal(*losses)
    finally:
        run_lock.release_all()
        dist_util.cleanup()


def test_a_run_adapts_resumes_and_refuses(script, tmp_path, monkeypatch):
    """Of another size and geometry, to the end; then again; then with other flags."""
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    path = write_trained(tmp_path / "old", network_of(3, True))
    images = write_shapes(tmp_path / "images", 4)
    flags = ("--data_dir", images, *NEW, "--resize", "pad", "--image_size", 32)
    ended = script("image_train.py", *flags, "--init_checkpoint", path, "--in_channels", 1)
    assert ended.code == 0, ended.err
    for said in ("new: nothing", "image_size 32 instead of 16", "in_channels 1 instead of 3"):
        assert said in ended.err
    assert "resize 'pad' instead of 'crop'" in ended.err
    config = json.loads((tmp_path / "run/config.json").read_text())
    network = {name: config["model"][name] for name in ("num_channels", "num_heads", "image_size")}
    assert network == {"num_channels": 16, "num_heads": 2, "image_size": 32}
    assert config["model"]["attention_resolutions"] == "16"  # as 8 of 16 pixels
    assert config["diffusion"] == dataclasses.asdict(DIFFUSION)
    assert config["began"]["checkpoint"] == str(path)

    again = (*flags[:-5], 3, *flags[-4:], "--init_checkpoint", path, "--in_channels", 1)
    path.rename(path.with_name("moved.pt"))
    ended = script("image_train.py", *again)
    assert ended.code == 0, ended.err
    assert "at step 1" in ended.err
    path.with_name("moved.pt").rename(path)
    weights = checkpoint.load(str(path))
    th.save({k: v + 1 for k, v in weights.items()}, path)
    ended = script("image_train.py", *again)
    assert (ended.code, "has other contents" in ended.err) == (2, True), ended.err

    monkeypatch.setenv("OPENAI_LOGDIR", "other")
    for more, said in (
        (("--num_channels", 32), "--num_channels 32 contradicts config.json beside"),
        (("--attention_resolutions", 8), "contradicts config.json beside"),
        (("--image_size", 33), "a multiple of 2"),
        (("--resume_checkpoint", path), "omit one of them"),
    ):
        ended = script("image_train.py", *flags, "--init_checkpoint", path, *more)
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
        assert said in ended.err
        assert not (tmp_path / "other/config.json").exists()
    # what resuming refuses is what this is for
    flags = ("--data_dir", images, *NEW, "--resize", "pad", "--resume_checkpoint")
    ended = script("image_train.py", *flags, tmp_path / "run/model000003.pt", "--resize", "squash")
    assert (ended.code, "--resize squash contradicts" in ended.err) == (2, True), ended.err
    assert f"--init_checkpoint {tmp_path / 'run/model000003.pt'} in place of" in ended.err
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    ended = script("image_train.py", *flags[:-1], "--resize", "squash")
    assert (ended.code, "--init_checkpoint" in ended.err) == (2, False), ended.err


def test_a_run_from_random_weights_does_not_begin_anew(script, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    path = write_trained(tmp_path / "old", NETWORK)
    images = write_shapes(tmp_path / "images", 4)
    flags = ("--data_dir", images, *NEW, "--num_channels", 16, "--channel_mult", "1")
    flags += ("--num_res_blocks", 1, "--image_size", 16, "--attention_resolutions", 8)
    assert script("image_train.py", *flags).code == 0
    ended = script("image_train.py", *flags, "--init_checkpoint", path)
    assert (ended.code, "did not begin from --init_checkpoint" in ended.err) == (2, True)


def test_files_of_the_original_package_are_described_by_the_flags(script, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    model = network_of(3, True, class_cond=True, num_classes=5)
    path = write_trained(tmp_path / "old", model, config=False)
    images = write_shapes(tmp_path / "images", 4)
    flags = ("--data_dir", images, *NEW, "--init_checkpoint", path, "--image_size", 32)
    ended = script("image_train.py", *flags, *PROCESS)
    assert (ended.code, "--use_new_attention_order" in ended.err) == (2, True), ended.err
    ended = script("image_train.py", *flags, *PROCESS, *SHAPELESS)
    assert ended.code == 0, ended.err
    assert "--in_channels 1 would adapt the network to them" in ended.err
    assert "the embedding of the mean of its 5 classes" in ended.err
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"]["attention_resolutions"] == "16"
    assert config["model"]["class_cond"] is False


def test_classes_are_kept_where_they_are_the_same(tmp_path):
    model = network_of(1, True, class_cond=True, num_classes=2)
    path = write_trained(tmp_path / "old", model, classes=CLASSES)
    old = checkpoint.load(str(path))["label_emb.weight"]
    flags = {"class_cond": True, "num_classes": 2}
    assert th.equal(adapted(path, CLASSES, **flags).label_emb.weight, old)
    assert not adapted(path, ("one", "other"), **flags).label_emb.weight.any()
    assert "label_emb.weight" not in adapted(path).state_dict()


def test_a_dry_run_describes_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "Trial", lambda run, clock: pytest.fail(repr(run.model)))
    path = write_trained(tmp_path / "old", network_of(3, True))
    flags = {"init_checkpoint": str(path), "in_channels": 1}
    expected = dataclasses.replace(network_of(1, True), channel_mult="1,2")
    with pytest.raises(pytest.fail.Exception, match=re.escape(repr(expected))):
        dry_run.dry_run({**flags, "max_steps": 1})


def test_other_networks_are_refused(tmp_path):
    path = write_trained(tmp_path / "old", NETWORK)
    weights = checkpoint.load(str(path))
    weights["middle_block.0.in_layers.2.weight"] = th.zeros(1)
    th.save(weights, path)
    with pytest.raises(UserError, match=re.escape(f"{path} does not fit the network")):
        adapted(path)
