"""Likelihoods: the recorded numbers, and scripts/image_nll.py as users run it."""

import csv
import dataclasses

import numpy as np
import pytest
import torch as th
from golden_util import GOLDEN, tensor
from process_util import Command, torchrun_environments
from sampling_util import CLASSES, DIFFUSION, NETWORK, arrays, write_shapes, write_trained

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.runtime import rng
from guided_diffusion.sampling.likelihood import likelihood_terms

RECORDED = np.load(GOLDEN / "diffusion.npz")
CASES = sorted({key.split("/")[1] for key in RECORDED.files if "/bpd_seed0/" in key})
SHORT = dataclasses.replace(DIFFUSION, diffusion_steps=6)


def toy(learn):
    """The "network" of the recorded numbers."""

    def network(x, t):
        out = 0.3 * x + 0.1 * th.sin(7 * x + t.to(x.dtype)[:, None, None, None] / 1000)
        return th.cat([out, 0.2 * th.cos(x)], dim=1) if learn else out

    return network


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_recorded_numbers(case):
    learn, xstart, kl, rescaled = (part[-1] == "1" for part in case.split("_")[:4])
    diffusion = DiffusionConfig(
        learn_sigma=learn,
        diffusion_steps=50,
        noise_schedule="cosine" if kl else "linear",
        timestep_respacing=case.split("_")[4],
        use_kl=kl,
        predict_xstart=xstart,
        rescale_timesteps=xstart,
        rescale_learned_sigmas=rescaled,
    ).build()
    x_start = tensor("x0", 3, 3, 8, 8).clamp(-1, 1)
    th.manual_seed(0)
    found = likelihood_terms(toy(learn), diffusion, [(range(3), x_start, {})], seed=None)
    for name, values in found.items():
        expected = RECORDED[f"d/{case}/bpd_seed0/{name}"]
        assert values.shape == expected.shape
        assert np.abs(values - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-30)


def test_batches_and_their_order_do_not_matter():
    images = tensor("x0", 5, 3, 8, 8).clamp(-1, 1)
    diffusion = SHORT.build()

    def measure(*groups):
        batches = [(group, images[list(group)], {}) for group in groups]
        return likelihood_terms(toy(True), diffusion, batches, seed=1)["total_bpd"]

    whole = measure(range(5))
    assert np.allclose(measure([0, 1], [2, 3], [4]), whole, rtol=1e-5)
    assert np.allclose(measure([4, 2], [0]), whole[[4, 2, 0]], rtol=1e-5)


class TestScript:
    @pytest.fixture
    def shapes(self, tmp_path):
        return write_shapes(tmp_path / "shapes", count=5)

    def test_it_measures_the_images_of_a_folder(self, script, tmp_path, shapes):
        model = write_trained(tmp_path / "run", diffusion=SHORT)
        flags = ("--model_path", model, "--data_dir", shapes)
        done = script("image_nll.py", *flags, "--num_samples", 3, "--batch_size", 2)
        assert done.code == 0, done.err
        folder = model.parent / "likelihood" / "ema_0.9_000010"
        with open(folder / "likelihood.csv") as file:
            rows = list(csv.DictReader(file))
        paths = sorted(map(str, shapes.iterdir()))[:3]
        assert [row["image"] for row in rows] == paths

        network = NETWORK.build()
        network.load_state_dict(th.load(model))
        images = np.stack([ReadingConfig(16, 1).load(path) for path in paths])
        expected = SHORT.build().calc_bpd_loop(
            network.eval(),
            th.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1,
            noise_fn=lambda x, t: rng.normal(0, f"likelihood {t}", range(3), x.shape[1:]),
        )
        found = [float(row["total_bpd"]) for row in rows]
        assert found == pytest.approx(expected["total_bpd"].tolist(), rel=1e-4)
        assert f"{np.mean(found):.4f} bits per dimension" in done.out
        for name in ("vb", "mse", "xstart_mse"):
            mean = arrays(folder / f"{name}_terms.npz")["arr_0"]
            assert np.allclose(mean, expected[name].mean(dim=0), rtol=1e-4)

    def test_ranks_share_the_images(self, script, tmp_path, shapes):
        model = write_trained(tmp_path / "run", diffusion=SHORT)
        flags = ["--model_path", model, "--data_dir", shapes]
        assert script("image_nll.py", *flags, "--out_dir", tmp_path / "one").code == 0
        ranks = [
            Command("image_nll.py", [*flags, "--out_dir", tmp_path / "two"], env, tmp_path / k)
            for k, env in zip("ab", torchrun_environments(2))
        ]
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said
        one, two = ((tmp_path / n / "likelihood.csv").read_text() for n in ("one", "two"))
        assert one.count("\n") == 6
        for a, b in zip(one.split("\n")[1:-1], two.split("\n")[1:-1]):
            assert a.split(",")[0] == b.split(",")[0]
            assert float(a.split(",")[1]) == pytest.approx(float(b.split(",")[1]), rel=1e-4)

    def test_classes_are_read_from_the_names(self, script, tmp_path, shapes):
        conditional = dataclasses.replace(NETWORK, class_cond=True, num_classes=2)
        model = write_trained(tmp_path / "run", conditional, SHORT, classes=CLASSES)
        flags = ("--model_path", model, "--data_dir", shapes)
        assert script("image_nll.py", *flags).code == 0
        next(shapes.glob("bar*")).rename(shapes / "cup_1.png")
        done = script("image_nll.py", *flags)
        assert done.code == 2
        assert "has class 'cup'" in done.err

    @pytest.mark.parametrize("flag", ["--num_samples", "--batch_size"])
    def test_below_one_is_refused(self, script, tmp_path, shapes, flag):
        model = write_trained(tmp_path / "run", diffusion=SHORT)
        done = script("image_nll.py", "--model_path", model, "--data_dir", shapes, flag, 0)
        assert done.code == 2
        assert f"{flag} 0" in done.err

    def test_a_folder_must_be_named(self, script, tmp_path):
        model = write_trained(tmp_path / "run", diffusion=SHORT)
        assert "--data_dir is missing" in script("image_nll.py", "--model_path", model).err
