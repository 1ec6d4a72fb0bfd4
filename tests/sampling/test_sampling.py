"""Samples as functions of seed and number; the flags of sampling; where samples go."""

from dataclasses import replace

import pytest
import torch as th
from golden_util import fill_parameters
from sampling_util import DIFFUSION, NETWORK

from guided_diffusion.networks.config import DiffusionConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.sampling.choices import choose_sampler, parse_labels
from guided_diffusion.sampling.config import SampleConfig
from guided_diffusion.sampling.folder import results_folder
from guided_diffusion.sampling.images import sample_images, save_grid, to_uint8
from guided_diffusion.sampling.solvers import SamplerOptions, Trajectory

SHAPE = (1, 16, 16)
WAYS = [
    ("dpm++2m", 1.0),
    ("ddpm", 0.0),
    ("ddim", 0.0),
    ("ddim", 1.0),
    ("dpm++2m", 0.0),
    ("heun", 0.0),
    ("unipc", 0.0),
]


@pytest.fixture(scope="module")
def network():
    """Tamer than random weights, which magnify the rounding of different kernels."""
    network = fill_parameters(NETWORK.build()).eval().requires_grad_(False)
    for parameter in network.out.parameters():
        parameter.mul_(0.5)
    return network


@pytest.fixture(scope="module")
def diffusion():
    return replace(DIFFUSION, diffusion_steps=1000).build()


@pytest.mark.parametrize(("sampler", "eta"), WAYS)
def test_an_image_depends_on_the_seed_and_its_number_alone(network, diffusion, sampler, eta):
    def sample(indices, seed=3):
        return sample_images(
            network,
            diffusion,
            SHAPE,
            indices,
            sampler=sampler,
            steps=4,
            seed=seed,
            options=SamplerOptions(eta=eta),
        )

    together = sample(range(8))
    for size in (1, 3):
        parts = [sample(range(8)[first : first + size]) for first in range(0, 8, size)]
        assert th.allclose(th.cat(parts), together, atol=1e-4)
    assert th.allclose(sample([5, 2]), together[[5, 2]], atol=1e-4)
    assert not th.allclose(sample([0]), sample([0], seed=4), atol=0.1)
    assert not th.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize("noise", ["sample", "step"])
def test_stochastic_samplers_draw_both_the_start_and_every_step(noise, diffusion, monkeypatch):
    """Without the noise of either, images of different numbers would be less different."""
    from guided_diffusion.runtime import rng

    drawn = []
    normal = rng.normal
    monkeypatch.setattr(rng, "normal", lambda *a, **k: drawn.append(a[1]) or normal(*a, **k))
    model = lambda x, t: th.zeros(len(x), 2, 16, 16)  # noqa: E731
    sample_images(model, diffusion, SHAPE, [0], sampler="ddpm", steps=3)
    assert len(set(drawn)) == len(drawn) == 3
    assert any(name.startswith(noise) for name in drawn)


def test_pixels_round_as_in_the_original():
    values = th.tensor([-2.0, -1.0, -0.999, 0.0, 0.999, 1.0, 2.0]).reshape(1, 1, 1, 7)
    assert to_uint8(values).ravel().tolist() == [0, 0, 0, 127, 254, 255, 255]
    assert to_uint8(th.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_a_grid_of_grey_and_of_coloured_images(tmp_path):
    from PIL import Image

    for channels in (1, 3):
        path = tmp_path / f"{channels}.png"
        save_grid(str(path), th.ones(4, channels, 8, 8))
        with Image.open(path) as picture:
            assert picture.size == (22, 22)
            assert picture.convert("L").getpixel((5, 5)) == 255


class TestChooseSampler:
    @pytest.mark.parametrize(
        ("flags", "respacing", "expected"),
        [
            ({}, "", ("ddpm", 50)),
            ({"use_ddim": True}, "", ("ddim", 50)),
            ({}, "10", ("ddpm", 10)),
            ({"use_ddim": True}, "ddim10", ("ddim", 10)),
            ({"steps": 7}, "", ("ddpm", 7)),
            ({"sampler": "dpm++2m"}, "", ("dpm++2m", 20)),
            ({"sampler": "unipc"}, "10", ("unipc", 10)),
            ({"sampler": "heun", "steps": 5}, "10", ("heun", 5)),
            ({"sampler": "ddim", "use_ddim": True, "eta": 0.5}, "", ("ddim", 50)),
        ],
    )
    def test_what_flags_mean(self, flags, respacing, expected):
        diffusion = DiffusionConfig(diffusion_steps=50, timestep_respacing=respacing).build()
        assert choose_sampler(SampleConfig(**flags), diffusion) == expected

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            ({"use_ddim": True, "sampler": "heun"}, "--use_ddim True contradicts --sampler heun"),
            ({"eta": 0.5}, "--eta 0.5"),
            ({"steps": 1001}, "--steps 1001.*1 to 1000"),
            ({"steps": -1}, "--steps -1"),
        ],
    )
    def test_contradictions_are_refused(self, flags, named, diffusion):
        with pytest.raises(UserError, match=named):
            choose_sampler(SampleConfig(**flags), diffusion)


class TestLabels:
    names = ("air", "bone", "7")

    def test_names_and_numbers_go_in_turn(self):
        labels = parse_labels("bone, 0", self.names, 1000, 0)
        assert labels.of(range(4)) == [1, 0, 1, 0]
        assert labels.of([3]) == [0]
        assert parse_labels("7", self.names, 1000, 0).chosen == (2,)
        assert [labels.name(n) for n in (0, 1)] == ["air", "bone"]

    def test_drawn_ones_are_functions_of_the_number_and_of_known_classes(self):
        labels = parse_labels("", self.names, 1000, 5)
        drawn = labels.of(range(300))
        assert labels.of(range(100, 200)) == drawn[100:200]
        counts = [drawn.count(label) for label in range(3)]
        assert sum(counts) == 300
        assert min(counts) > 60
        assert max(parse_labels("", (), 1000, 5).of(range(300))) > 900

    @pytest.mark.parametrize("text", ["teeth", "3", "-1"])
    def test_there_must_be_such_a_class(self, text):
        with pytest.raises(UserError, match=f"{text}: there are air, bone, 7 or 0 to 2"):
            parse_labels(text, self.names, 1000, 0)


class TestResultsFolder:
    def test_beside_the_checkpoint(self, monkeypatch):
        monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
        assert results_folder("", "runs/a/model.pt", "samples", "x") == "runs/a/samples/x"
        assert results_folder("", "model.pt", "samples") == "./samples"

    def test_in_openai_logdir_as_in_the_original(self, monkeypatch, tmp_path):
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
        assert results_folder("", "runs/a/model.pt", "samples", "x") == str(tmp_path)

    def test_below_openai_logdir_where_a_training_run_lives(self, monkeypatch, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
        folder = results_folder("", "runs/a/model.pt", "samples", "x")
        assert folder == str(tmp_path / "samples" / "x")

    def test_the_users_own(self, monkeypatch, tmp_path):
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
        assert results_folder("there", "runs/a/model.pt", "samples") == "there"


def unclipped(eta):
    return SamplerOptions(eta=eta, clip_denoised=False)


class TestNoiseOfDpmSolver:
    """Data of one point, whose noise a perfect network knows."""

    point = 0.4

    def sample(self, diffusion, eta, strength=1.0, steps=20):
        def network(x, t):
            abar = th.from_numpy(diffusion.alphas_cumprod)[t][:, None, None, None]
            eps = (x - abar.sqrt() * self.point) / (1 - abar).sqrt()
            return (strength * eps).float()

        return sample_images(
            network, diffusion, (1, 32, 32), range(4), steps=steps, options=unclipped(eta)
        )

    @pytest.fixture
    def process(self):
        """Fixed variances: nothing but the noise is predicted."""
        return DiffusionConfig(diffusion_steps=1000, noise_schedule="cosine").build()

    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    def test_a_perfect_network_finds_the_point(self, process, eta):
        assert th.allclose(self.sample(process, eta), th.tensor(self.point), atol=1e-3)

    def test_without_eta_it_is_deterministic(self, process, monkeypatch):
        def refuse(*args):
            raise AssertionError("noise was drawn")

        monkeypatch.setattr(Trajectory, "noise", refuse)
        self.sample(process, 0.0)
        with pytest.raises(AssertionError, match="noise was drawn"):
            self.sample(process, 0.5)

    def test_it_mends_what_an_imperfect_network_leaves(self, process):
        """A network that finds too little of the noise leaves some in the image."""
        left = [self.sample(process, eta, strength=0.97).std() for eta in (0.0, 1.0)]
        assert left[1] < left[0] / 2

    def test_the_spread_of_data_is_kept(self, process):
        """Normal data of deviation 0.5: so are the samples."""

        def network(x, t):
            abar = th.from_numpy(process.alphas_cumprod)[t][:, None, None, None]
            return ((1 - abar).sqrt() * x / (abar * 0.25 + 1 - abar)).float()

        for eta in (0.5, 1.0):
            images = sample_images(
                network, process, (1, 32, 32), range(8), steps=60, options=unclipped(eta)
            )
            assert images.std() == pytest.approx(0.5, abs=0.02)
            assert images.mean() == pytest.approx(0, abs=0.03)
