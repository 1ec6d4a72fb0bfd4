"""guided_diffusion.training.weighting: the papers' weights of the squared error by timestep."""

import dataclasses
import json

import numpy as np
import pytest
from loop_util import DIFFUSION, new_loop, rows, run_in

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.training.weighting import mse_weights

NOISE = DIFFUSION.build()
IMAGE = dataclasses.replace(DIFFUSION, predict_xstart=True).build()
SNR = NOISE.alphas_cumprod / (1 - NOISE.alphas_cumprod)


def test_none():
    assert mse_weights(NOISE, "none") is None


def test_p2():
    """(k + SNR)^-gamma with k = gamma = 1 is the variance of the noise."""
    np.testing.assert_allclose(mse_weights(NOISE, "p2"), 1 - NOISE.alphas_cumprod)


def test_min_snr():
    weights = mse_weights(NOISE, "min_snr")
    low = SNR <= 5
    assert low.any()
    assert not low.all()
    np.testing.assert_allclose(weights[low], 1)
    np.testing.assert_allclose(weights[~low], 5 / SNR[~low])
    np.testing.assert_allclose(mse_weights(IMAGE, "min_snr"), np.minimum(SNR, 5))


@pytest.mark.parametrize("name", ["p2", "min_snr"])
def test_noise_and_image_are_weighted_alike(name):
    """The squared error of the noise is SNR times that of the image."""
    np.testing.assert_allclose(mse_weights(IMAGE, name), SNR * mse_weights(NOISE, name))


@pytest.mark.parametrize("name", ["p2", "min_snr"])
def test_finite_to_the_last_timestep_of_a_long_cosine_schedule(name):
    process = dataclasses.replace(DIFFUSION, diffusion_steps=4000).build()
    weights = mse_weights(process, name)
    assert np.isfinite(weights).all()
    assert (weights > 0).all()
    assert weights[-1] == pytest.approx(1)


def test_the_loop_weights_the_term(tmp_path):
    weights = np.linspace(0.5, 3, NOISE.num_timesteps)

    def one_image(first):
        return ((images[:1], cond) for images, cond in new_loop().data)

    options = {"batch_size": 1, "data": one_image, "diffusion": NOISE}
    seen = []
    loop = new_loop(**options, mse_weights=weights)
    losses = loop.losses

    def record(*args):
        ts, importance, terms = losses(*args)
        expected = weights[ts.item()] * terms["mse"] + terms["vb"]
        assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
        seen.append(ts.item())
        return ts, importance, terms

    loop.losses = record
    loop.max_steps = 3
    loop.folder = str(tmp_path)
    loop.run_loop()
    assert len(seen) == 3


def test_weights_of_one_change_nothing(tmp_path):
    run_in(tmp_path / "plain", 2)
    run_in(tmp_path / "ones", 2, mse_weights=np.ones(NOISE.num_timesteps))
    for name in ("model000002.pt", "opt000002.pt"):
        plain, ones = ((tmp_path / f / name).read_bytes() for f in ("plain", "ones"))
        assert plain == ones
    assert rows(tmp_path / "plain")[0]["loss"] == rows(tmp_path / "ones")[0]["loss"]


def test_the_variational_bound_has_no_such_error():
    with pytest.raises(UserError, match=r"--loss_weighting p2 weights the squared .*--use_kl"):
        mse_weights(dataclasses.replace(DIFFUSION, use_kl=True).build(), "p2")


@pytest.mark.parametrize("more", [("--use_kl", "True"), ("--segmentation_guided", "True")])
def test_contradicting_flags(script, split, tmp_path, monkeypatch, more):
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    flags = ("--data_dir", split / "TRAIN" / "IMG", "--loss_weighting", "p2", *more)
    ended = script("image_train.py", *flags)
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
    assert "--loss_weighting" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_run_records_it(script, split, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    flags = ("--image_size", 16, "--num_channels", 16, "--channel_mult", "1", "--num_heads", 1)
    flags += ("--num_res_blocks", 1, "--attention_resolutions", "8", "--batch_size", 2)
    flags += ("--noise_schedule", "cosine", "--diffusion_steps", 10, "--log_interval", 1)
    flags += ("--data_dir", split / "TRAIN" / "IMG", "--max_steps", 1, "--sample_interval", 0)
    ended = script("image_train.py", *flags, "--loss_weighting", "min_snr")
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["training"]["loss_weighting"] == "min_snr"
    (row,) = rows(tmp_path / "run")
    assert float(row["loss"]) < float(row["mse"])
