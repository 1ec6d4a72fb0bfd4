"""Members of an ensemble: timesteps, views, draws and checkpoints; and what they disagree about."""

import math

import numpy as np
import pytest
import torch as th
from conftest import TINY
from golden_util import fill_parameters
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.segmentation.categories import Category, generic_categories
from guided_diffusion.segmentation.inference.predictor import Ensemble, Predictor, load_predictor
from guided_diffusion.segmentation.inference.uncertainty import EnsembleMean, entropy, next_to_label
from guided_diffusion.segmentation.inference.views import SHIFT, View, views_for
from guided_diffusion.segmentation.model_file import SegmentationConfig, save_model
from guided_diffusion.segmentation.networks.kind import MemberOptions

SIDED = tuple(
    Category(i, name, (i, i, i)) for i, name in enumerate(["background", "right lung", "left lung"])
)


def config(resize="pad", categories=None, kind="unet", flip_swaps=None, **reading):
    reading = ReadingConfig(16, 1, resize, **reading)
    categories = categories or generic_categories(3)
    return SegmentationConfig(TINY, reading, categories, kind=kind, flip_swaps=flip_swaps)


@pytest.fixture(scope="module")
def network():
    return fill_parameters(config().build())


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 28), dtype=np.uint8)


def save(path, settings, seed=0, **extra):
    th.manual_seed(seed)
    network = fill_parameters(settings.build())
    with th.no_grad():
        network.out[2].weight.mul_(1 + seed)
    save_model(str(path), settings, network.state_dict(), **extra)
    return str(path)


class Draws(th.nn.Module):
    """Draws two masks: wherever the image is bright, class 1 in the first and 2 in the second."""

    num_samples = 2

    def draw(self, x, number):
        bright = (x > 0).float()
        return th.cat([1 - bright, bright * (number == 0), bright * (number == 1)], 1)


def test_views_are_brought_back():
    """A network that answers each pixel with its own grey must answer the same in every view."""
    x = th.rand(2, 1, 16, 18)
    for view in views_for("all"):
        back = view.invert(view.apply(x))
        inner = (..., slice(SHIFT, -SHIFT), slice(SHIFT, -SHIFT))
        assert th.equal(back[inner], x[inner])
    assert th.equal(views_for("none")[0].apply(x), x)
    assert [len(views_for(tta)) for tta in ("none", "flips", "shifts", "all")] == [1, 2, 5, 10]


def test_a_shift_moves_and_repeats_the_border():
    row = th.arange(5.0).reshape(1, 1, 1, 5)
    assert View((0, 2)).apply(row).flatten().tolist() == [0, 0, 0, 1, 2]
    assert View((0, 2)).invert(View((0, 2)).apply(row)).flatten().tolist() == [0, 1, 2, 2, 2]
    assert View((0, -9)).apply(row).flatten().tolist() == [4] * 5


def test_a_mirrored_view_exchanges_the_classes_of_the_sides():
    found = th.arange(3.0).reshape(1, 3, 1, 1) + th.tensor([0.0, 0.1])
    back = View(mirrored=True, swaps=((1, 2),)).invert(found)
    expected = th.tensor([[0.1, 0.0], [2.1, 2.0], [1.1, 1.0]]).reshape(1, 3, 1, 2)
    th.testing.assert_close(back, expected)


def test_entropy():
    p = th.tensor([[1.0, 0, 0], [1 / 3] * 3, [0.5, 0.5, 0]])
    expected = th.tensor([0, 1, math.log(2) / math.log(3)])
    th.testing.assert_close(entropy(p, 1), expected)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 4))
def test_disagreement_is_mutual_information(seed, members, classes):
    p = th.from_numpy(np.random.default_rng(seed).dirichlet([0.3] * classes, (members, 1, 2, 3)))
    p = p.movedim(-1, 2)
    tally = EnsembleMean()
    for one in p:
        tally.add(one)
    mean = p.mean(0)
    terms = p * (p.clamp_min(1e-300) / mean.clamp_min(1e-300)).log()
    information = terms.sum(2).mean(0) / math.log(classes)  # mean divergence from the mean
    th.testing.assert_close(tally.disagreement(), information, atol=1e-6, rtol=1e-6)
    assert (tally.disagreement() <= entropy(mean, 1) + 1e-6).all()


def test_timesteps_are_averaged(network, image):
    several = Predictor(network, config(), options=MemberOptions((1, 50, 150))).segment([image])[0]
    single = [
        Predictor(network, config(), options=MemberOptions((t,))).segment([image])[0]
        for t in (1, 50, 150)
    ]
    np.testing.assert_allclose(several, np.mean(single, axis=0), atol=1e-6)
    assert np.abs(single[0] - single[2]).max() > 1e-4
    own = Predictor(network, config()).segment([image])[0]
    np.testing.assert_allclose(own, single[0], atol=1e-6)


@pytest.mark.parametrize("resize", ["pad", "crop", "native"])
def test_every_pixel_has_an_uncertainty(network, image, resize):
    predictor = Predictor(network, config(resize), views=views_for("shifts"))
    prediction = predictor.start([image])[0]()
    probabilities, uncertainty = prediction.probabilities, prediction.uncertainty
    assert uncertainty.shape == image.shape
    assert uncertainty.dtype == np.float32
    expected = -(probabilities * np.log(probabilities.clip(1e-30))).sum(0) / math.log(3)
    np.testing.assert_allclose(uncertainty, expected, atol=1e-5)
    disagreement = prediction.disagreement
    assert disagreement.shape == image.shape
    assert 0 <= disagreement.min() <= disagreement.max()
    assert (disagreement <= uncertainty + 1e-5).all()
    assert disagreement.max() > 0
    alone = Predictor(network, config(resize)).start([image])[0]()
    assert alone.disagreement is None


@pytest.mark.parametrize("resize", ["pad", "native"])
def test_draws_are_members(resize):
    image = np.full((16, 16), 10, np.uint8)
    image[4:9, 4:9] = 250
    settings = config(resize, kind="mask_diffusion")
    prediction = Predictor(Draws(), settings).start([image])[0]()
    inside, outside = prediction.probabilities[:, 6, 6], prediction.probabilities[:, 0, 0]
    np.testing.assert_allclose(inside, [0, 0.5, 0.5], atol=1e-4)
    np.testing.assert_allclose(outside, [1, 0, 0], atol=1e-4)
    assert prediction.disagreement[6, 6] == pytest.approx(math.log(2) / math.log(3), abs=1e-3)
    assert prediction.disagreement[0, 0] == pytest.approx(0, abs=1e-3)


def test_checkpoints_are_averaged_though_their_sizes_differ(tmp_path, image):
    one = save(tmp_path / "a.pth", config())
    other = save(tmp_path / "b.pth", config("squash"), seed=1)
    both = load_predictor(f"{one},{other}", "cpu")
    assert isinstance(both, Ensemble)
    single = [load_predictor(path, "cpu").segment([image])[0] for path in (one, other)]
    prediction = both.start([image])[0]()
    np.testing.assert_allclose(prediction.probabilities, np.mean(single, axis=0), atol=1e-6)
    entropies = [entropy(th.from_numpy(p), 0).numpy() for p in single]
    np.testing.assert_allclose(
        prediction.disagreement, prediction.uncertainty - np.mean(entropies, axis=0), atol=1e-5
    )
    twice = load_predictor(f"{one},{one}", "cpu").start([image])[0]()
    assert twice.disagreement.max() < 1e-6


def test_models_that_differ_in_what_matters_are_not_averaged(tmp_path):
    first = save(tmp_path / "a.pth", config())
    cases = {
        "3 classes and .*b.pth 2": config(categories=generic_categories(2)),
        "class 1 is 'class 1' in .* and 'right lung' in": config(categories=SIDED),
        "intensity full and percentile": config(intensity="percentile"),
    }
    for message, settings in cases.items():
        save(tmp_path / "b.pth", settings)
        with pytest.raises(UserError, match=message):
            load_predictor(f"{first},{tmp_path / 'b.pth'}", "cpu")
    with pytest.raises(UserError, match=r"nowhere\.pth is missing"):
        load_predictor(f"{first},nowhere.pth", "cpu")


def test_sides_need_a_word_before_a_mirror(tmp_path, image):
    sided = save(tmp_path / "a.pth", config(categories=SIDED))
    with pytest.raises(UserError, match=r"'right lung' has a side.*--flip_swap 1:2"):
        load_predictor(sided, "cpu", tta="flips")
    for tta in ("flips", "none", "shifts"):
        with pytest.raises(UserError, match="class 7"):
            load_predictor(sided, "cpu", tta=tta, flip_swap="1:7")
    mirrored = image[:, ::-1].copy()
    swapping = load_predictor(sided, "cpu", tta="flips", flip_swap="1:2")
    here, there = (swapping.segment([i])[0] for i in (image, mirrored))
    np.testing.assert_allclose(here, there[[0, 2, 1], :, ::-1], atol=1e-5)
    keeping = load_predictor(sided, "cpu", tta="flips", flip_swap="")
    here, there = (keeping.segment([i])[0] for i in (image, mirrored))
    np.testing.assert_allclose(here, there[:, :, ::-1], atol=1e-5)
    trained = save(tmp_path / "b.pth", config(categories=SIDED, flip_swaps=((1, 2),)))
    old = tmp_path / "c.pth"  # version 0.1.0 recorded the flags of its training alone
    values = th.load(sided, weights_only=True)
    del values["flip_swaps"]
    th.save({**values, "origin": {"flip": "horizontal", "flip_swap": "1:2"}}, old)
    for path in (trained, str(old)):
        np.testing.assert_array_equal(
            load_predictor(path, "cpu", tta="flips").segment([image])[0],
            swapping.segment([image])[0],
        )


def test_settings_that_do_not_fit_are_refused(tmp_path, network):
    path = save(tmp_path / "a.pth", config())
    with pytest.raises(UserError, match=r"a\.pth: networks of kind unet have no --steps: leave"):
        load_predictor(path, "cpu", MemberOptions(steps=3))
    with pytest.raises(UserError, match="kind mask_diffusion have no --timesteps"):
        Predictor(Draws(), config(kind="mask_diffusion"), options=MemberOptions((1,)))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Predictor(network, config(), precision="fp16")
    with pytest.raises(UserError, match="--tta rotations"):
        views_for("rotations")


def test_bfloat16_is_close(network, image):
    exact, half = (
        Predictor(network, config(), precision=p).segment([image])[0] for p in ("fp32", "bf16")
    )
    assert 0 < np.abs(exact - half).max() < 0.05


def test_the_least_certain_is_next():
    assert next_to_label({"a": 0.1, "b": 0.3, "c": 0.2}) == "b"
