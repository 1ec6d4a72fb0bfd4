"""Linear probes: of a network, of a run in training, of a run's checkpoints."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from conftest import TINY, TINY_DIFFUSION, draw_pairs
from PIL import Image

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.networks.trained import Trained
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation.categories import generic_categories
from guided_diffusion.segmentation.evaluation import linear_probe as probes
from guided_diffusion.segmentation.evaluation.probe_curve import (
    Point,
    ProbeCurve,
    gain,
    levelled_off,
)
from guided_diffusion.segmentation.training.dataset import load_labelled
from guided_diffusion.unet import UNetModel


def trained(config: ModelConfig = TINY) -> Trained:
    th.manual_seed(0)
    network = config.build()
    reading = ReadingConfig(config.image_size, 1)
    return Trained(
        model=config,
        diffusion=TINY_DIFFUSION,
        reading=reading,
        path="",
        weights=network.state_dict(),
    )


def labelled(folder):
    reading = ReadingConfig(16, 1, "pad")
    rule = generic_categories(3).mask_rule()
    return [
        load_labelled(str(folder / part / "IMG"), str(folder / part / "MASK"), reading, rule)
        for part in ("TRAIN", "VAL")
    ]


class TestLinearProbe:
    def test_bands_of_their_own_grey_are_told_apart(self, split):
        scores = probes.linear_probe(trained(), *labelled(split), 3, "cpu")
        assert scores.dice.shape == (2, 3)
        assert np.nanmean(scores.per_image) > 0.6
        assert scores.per_image == [np.nanmean(row[1:]) for row in scores.dice]

    def test_it_leaves_no_trace_and_no_precision_changes_it(self, split):
        of = trained()
        data = labelled(split)
        before = th.get_rng_state()
        once = probes.linear_probe(of, *data, 3, "cpu")
        assert th.equal(th.get_rng_state(), before)
        th.manual_seed(5)
        with th.autocast("cpu", th.bfloat16):
            again = probes.linear_probe(of, *data, 3, "cpu")
        np.testing.assert_array_equal(once.dice, again.dice)

    def test_a_network_with_classes(self, split):
        config = dataclasses.replace(TINY, class_cond=True, num_classes=2)
        scores = probes.linear_probe(trained(config), *labelled(split), 3, "cpu")
        assert np.nanmean(scores.per_image) > 0.5

    @pytest.mark.parametrize(
        ("mult", "blocks", "size", "expected"),
        [
            # a level's last block enlarges to the next
            ("1,1,1,1", 1, 128, [0, 1, 2, 3, 4]),
            ("1,1,1,1", 1, 64, [1, 2, 3, 4]),
            ("1,1,1,1,1", 1, 128, [1, 2, 3, 4, 5, 6]),
            ("1,1,1", 2, 64, [0, 1, 2, 3, 4]),
            ("1,1", 1, 16, [0, 1, 2, 3]),
            ("1", 1, 64, [0, 1]),
        ],
    )
    def test_blocks_of_a_suitable_size(self, mult, blocks, size, expected):
        config = dataclasses.replace(
            TINY,
            image_size=size,
            channel_mult=mult,
            num_res_blocks=blocks,
            attention_resolutions="",
        )
        network = config.build()
        found = probes.probe_blocks(network, size)
        assert found == expected
        maps = probes.decoder_features(network, found, th.zeros(1, 1, size, size), 1)
        sides = {one.shape[-1] for one in maps}
        assert len(found) == len(network.output_blocks) or sides <= {16, 32, 64} - {size}

    def test_values_at_places_are_those_of_interpolation(self):
        maps = [th.randn(1, 3, 4, 6), th.randn(1, 2, 8, 12)]
        places = np.argwhere(np.ones((16, 24)))
        large = [F.interpolate(one, (16, 24), mode="bilinear") for one in maps]
        expected = th.cat(large, 1)[0].flatten(1).T
        found = probes._at(maps, places, (16, 24))
        th.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_the_fit_is_the_optimum(self):
        generator = np.random.default_rng(0)
        samples = th.from_numpy(generator.normal(3, [1, 2, 5], (200, 3))).float()
        labels = (samples[:, 0] > samples[:, 1]).long()
        regression = probes.RidgeRegression(2)
        for part in (slice(70), slice(70, 200)):
            regression.add(samples[part], labels[part])
        weight, bias = regression.solve()
        scale = samples.std(0, correction=0)

        def loss(w, b):
            errors = samples @ w.T + b - F.one_hot(labels, 2)
            penalty = probes.RIDGE * (w * scale).square().sum()
            return float(errors.double().square().mean(0).sum() + penalty)

        best = loss(weight, bias)
        for _ in range(20):
            change = th.from_numpy(generator.normal(0, 0.02, weight.shape)).float()
            assert loss(weight + change, bias) > best
            assert loss(weight, bias + change[:, 0]) > best

    def test_weights_that_are_not_finite_score_nothing(self, split):
        of = trained()
        broken = {name: value * np.nan for name, value in of.weights.items()}
        of = dataclasses.replace(of, weights=broken)
        scores = probes.linear_probe(of, *labelled(split), 3, "cpu")
        assert np.nanmean(scores.per_image) < 0.5


def points(*means: float, noise: float = 0.0) -> list[Point]:
    """A curve over 4 images, which differ; noise is added to half of them at every other step."""
    images = 0.1 * np.arange(4)
    noises = noise * np.array([1, -1, 1, -1])
    return [
        Point(1000 * n, tuple(mean + images + n % 2 * noises), (0.9, mean))
        for n, mean in enumerate(means, 1)
    ]


class TestLevellingOff:
    def test_a_rising_curve(self):
        assert levelled_off(points(0.1, 0.2, 0.3)) is None
        assert levelled_off(points(0.1, 0.2, 0.3, 0.31, 0.32)) is None

    def test_three_probes_without_a_gain(self):
        curve = points(0.1, 0.4, 0.4, 0.39, 0.4)
        assert levelled_off(curve[:-1]) is None  # 0.1, then 3
        assert levelled_off(curve) is curve[1]

    def test_a_gain_within_its_error_is_none(self):
        assert levelled_off(points(0.4, 0.41, 0.4, 0.41)) is None
        flat = points(0.4, 0.41, 0.4, 0.41, noise=0.05)
        assert levelled_off(flat) is flat[0]

    def test_images_are_compared_in_pairs(self):
        rise, error = gain(*points(0.2, 0.21))
        assert rise == pytest.approx(0.01)
        assert error == pytest.approx(0, abs=1e-9)  # though images differ by 0.3

    def test_a_single_image_and_one_without_foreground(self):
        nan = float("nan")
        assert gain(Point(1, (0.5, nan), ()), Point(2, (0.6, nan), ())) == (pytest.approx(0.1), 0)


class TestCurve:
    def curve(self, folder, **files):
        return ProbeCurve(
            str(folder), generic_categories(3), {"val": {"a": "1 2", **files}}, ["a", "b"]
        )

    def test_it_continues_up_to_a_step(self, tmp_path):
        curve = self.curve(tmp_path)
        nan = float("nan")
        for step in (10, 20, 30):
            said = curve.add(Point(step, (0.5, nan), (0.9, 0.5, nan)))
            assert said == f"probe at step {step}: mean Dice 0.5000"
        again = self.curve(tmp_path)
        again.load(20)
        assert [point.step for point in again.points] == [10, 20]
        assert str(again.points) == str(curve.points[:2])
        assert 20 in again
        assert 30 not in again
        assert Image.open(tmp_path / "probe.png").size[0] > 300

    def test_it_says_once_that_it_has_levelled_off(self, tmp_path):
        curve = self.curve(tmp_path)
        said = [curve.add(Point(step, (0.5, 0.6), (0.9, 0.5, 0.5))) for step in range(1, 7)]
        told = [text for text in said if "stopped rising" in text]
        assert told == [said[3]]
        assert (
            "none of the last 3 probes gained more than its standard error over step 1" in told[0]
        )

    def test_other_images_or_classes(self, tmp_path):
        self.curve(tmp_path).add(Point(1, (0.5, 0.5), (0.9, 0.5, 0.5)))
        with pytest.raises(UserError, match="other labelled images"):
            self.curve(tmp_path, a="3 2").load()
        two = ProbeCurve(str(tmp_path), generic_categories(2), {"val": {"a": "1 2"}}, [])
        with pytest.raises(UserError, match="other classes"):
            two.load()

    @pytest.mark.parametrize("text", ["{}", "[1]", '{"points": 3, "files": [], "classes": 1}', "x"])
    def test_a_damaged_file(self, tmp_path, text):
        (tmp_path / "probe.json").write_text(text)
        with pytest.raises(UserError, match=r"probe\.json"):
            self.curve(tmp_path).load()


FLAGS = """
    --image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 1
    --attention_resolutions 8 --learn_sigma True --diffusion_steps 20 --noise_schedule cosine
    --batch_size 2 --lr 1e-3 --ema_rate 0.5,0.9 --dropout 0.1 --sample_interval 0
    --save_interval 3 --log_interval 2
""".split()  # noqa: SIM905 - as on a command line


def table(folder) -> list[dict[str, str]]:
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def curve_of(folder) -> dict:
    return json.loads((folder / "probe.json").read_text())


@pytest.fixture
def train(script, split, monkeypatch):
    """Trains in a folder until a step, with probes unless told otherwise."""

    def run(folder, steps, *more, probes=True):
        monkeypatch.setenv("OPENAI_LOGDIR", str(folder))
        monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")
        flags = ("--probe_dir", split, "--probe_interval", 2) if probes else ()
        data = ("--data_dir", split / "TRAIN" / "IMG", "--max_steps", steps)
        return script("image_train.py", *FLAGS, *data, *flags, *more)

    return run


class TestTraining:
    def test_weights_are_those_of_a_run_without_probes(self, train, tmp_path):
        assert train(tmp_path / "a", 5).code == 0
        assert train(tmp_path / "b", 5, probes=False).code == 0
        for name in ("model000005.pt", "ema_0.9_000005.pt", "opt000005.pt"):
            one, other = (checkpoint.load(str(tmp_path / run / name)) for run in "ab")
            th.testing.assert_close(one, other, rtol=0, atol=0)

    def test_every_interval_and_at_the_end(self, train, tmp_path):
        ended = train(tmp_path / "run", 5)
        assert ended.code == 0, ended.err
        curve = curve_of(tmp_path / "run")
        assert [point["step"] for point in curve["points"]] == [2, 4, 5]
        rows = {int(row["step"]): row for row in table(tmp_path / "run")}
        assert list(rows) == [2, 4, 5]
        for point in curve["points"]:
            row = rows[point["step"]]
            assert float(row["probe_dice"]) == pytest.approx(point["dice"])
            assert float(row["probe_dice class 1"]) == pytest.approx(point["classes"][1])
        log = (tmp_path / "run" / "log.txt").read_text()
        assert "probe at step 5: mean Dice 0." in log
        assert "probe: 3 classes: 0 background, 1 class 1, 2 class 2" in log
        assert (tmp_path / "run" / "probe.png").exists()

    def test_a_killed_run_has_the_curve_of_an_undisturbed_one(self, train, tmp_path, monkeypatch):
        assert train(tmp_path / "whole", 8).code == 0
        step = UNetModel.forward
        with monkeypatch.context() as patch:  # dies at step 5, after the checkpoint of step 3
            calls = iter(range(10**6))
            limit = 5

            def forward(self, *args, **kwargs):
                if self.training and next(calls) == limit:
                    raise KeyboardInterrupt
                return step(self, *args, **kwargs)

            patch.setattr(UNetModel, "forward", forward)
            assert train(tmp_path / "killed", 8).code == 130
        assert [point["step"] for point in curve_of(tmp_path / "killed")["points"]] == [2, 4]
        assert train(tmp_path / "killed", 8).code == 0
        assert curve_of(tmp_path / "killed") == curve_of(tmp_path / "whole")
        dice = [
            [(row["step"], row["probe_dice"]) for row in table(tmp_path / run)]
            for run in ("killed", "whole")
        ]
        assert dice[0] == dice[1]

    def test_what_is_refused_before_training(self, train, split, tmp_path):
        def refused(text, *flags):
            ended = train(tmp_path / "run", 1, *flags, probes=False)
            assert ended.code == 2
            assert ended.err.startswith("error: ")
            assert ended.err.count("\n") == 1
            assert text in ended.err, ended.err
            assert not (tmp_path / "run" / "config.json").exists()

        refused("nowhere/TRAIN/IMG is missing", "--probe_dir", "nowhere")
        refused("--probe_interval 0: must be at least 1", "--probe_interval", 0)
        refused("--probe_interval needs --probe_dir", "--probe_interval", 5)
        guided = ("--segmentation_guided", True, "--num_segmentation_classes", 3)
        refused("--segmentation_guided", *guided, "--probe_dir", split)
        shutil.copytree(split, tmp_path / "odd")
        (tmp_path / "odd" / "VAL" / "MASK" / "r0.png").unlink()
        refused("has no mask", "--probe_dir", tmp_path / "odd")
        shutil.copy(split / "VAL" / "MASK" / "r0.png", tmp_path / "odd" / "VAL" / "MASK")
        Image.fromarray(np.full((16, 20), 200, np.uint8)).save(
            tmp_path / "odd" / "VAL" / "MASK" / "r0.png"
        )
        refused("200", "--probe_dir", tmp_path / "odd")

    def test_another_curve_in_the_folder_is_not_overwritten(self, train, split, tmp_path):
        assert train(tmp_path / "run", 2).code == 0
        draw_pairs(split / "VAL", 2, seed=7)
        ended = train(tmp_path / "run", 4)
        assert ended.code == 2
        assert "is the curve of other labelled images" in ended.err


class TestCheckpoints:
    def test_they_give_the_curve_of_the_training(self, script, train, split, tmp_path):
        assert train(tmp_path / "run", 6, "--probe_interval", 3).code == 0
        ended = script("probe.py", tmp_path / "run", split, "--output", tmp_path / "again")
        assert ended.code == 0, ended.err
        assert curve_of(tmp_path / "again") == curve_of(tmp_path / "run")
        assert "too few probes to say whether the Dice still rises: 4 at least" in ended.out

    def test_a_rerun_probes_only_what_is_new(self, script, train, split, tmp_path, monkeypatch):
        assert train(tmp_path / "run", 3, probes=False).code == 0
        assert script("probe.py", tmp_path / "run", split).code == 0
        assert train(tmp_path / "run", 6, probes=False).code == 0
        seen = []
        whole = Trained.network
        monkeypatch.setattr(
            Trained, "network", lambda self, device: seen.append(self.path) or whole(self, device)
        )
        assert script("probe.py", tmp_path / "run", split).code == 0
        assert seen == [str(tmp_path / "run" / "ema_0.9_000006.pt")]
        assert [point["step"] for point in curve_of(tmp_path / "run")["points"]] == [3, 6]
        # and a training goes on with it
        assert train(tmp_path / "run", 8).code == 0
        assert [point["step"] for point in curve_of(tmp_path / "run")["points"]] == [3, 6, 8]

    def test_a_folder_without_checkpoints(self, script, split, tmp_path):
        ended = script("probe.py", tmp_path / "nothing", split)
        assert ended.code == 2
        assert "nothing holds no checkpoints" in ended.err
        assert not (tmp_path / "nothing").exists()
