"""Classifiers of noised images: their loss, training and resuming, guidance by their gradient."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch as th
from sampling_util import (
    CLASSES,
    CLASSIFIER,
    DIFFUSION,
    NETWORK,
    arrays,
    write_shapes,
    write_trained,
)

from guided_diffusion import logger
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.sampling.guidance import classifier_gradient
from guided_diffusion.training.classifier import ClassifierLoop, ClassifierTrainConfig

FEW = ("--num_samples", 2, "--steps", 2)  # lest a wrong answer takes for ever
SCHEDULE = ("--diffusion_steps", 50, "--noise_schedule", "cosine")
FLAGS = (
    *("--image_size", 16, "--num_classes", 2, "--classifier_width", 32, "--classifier_depth", 1),
    *("--classifier_attention_resolutions", "8", *SCHEDULE, "--log_interval", 2),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


class Logits(th.nn.Module):
    """Answers with logits that are the image's first pixels; keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight = th.nn.Parameter(th.ones(1))

    def forward(self, x, timesteps):
        self.asked = x, timesteps
        return x.flatten(1)[:, :7] * self.weight


def loop(model, tmp_path, noised=True):
    return ClassifierLoop(
        model=model,
        diffusion=DIFFUSION.build(),
        data=iter(()),
        settings=ClassifierTrainConfig(noised=noised),
        folder=str(tmp_path),
    )


class TestLoss:
    def terms(self, tmp_path, noised):
        model = Logits()
        images = th.zeros(2, 1, 4, 4)
        images[0, 0, 0, 3] = 2.0  # the first image is of class 3
        images[1, 0, 0, :3] = 3.0
        images[1, 0, 1, :3] = 3.0  # class 3 of the second is the last but none
        terms = loop(model, tmp_path, noised).loss_terms(
            model, images, th.tensor([10, 40]), {"y": th.tensor([3, 3])}, th.ones_like(images)
        )
        return terms, model.asked, images

    def test_cross_entropy_and_accuracy_of_clean_images(self, tmp_path):
        terms, (asked, times), images = self.terms(tmp_path, noised=False)
        assert th.equal(asked, images)
        assert times.tolist() == [0, 0]
        expected = [math.log(6 + math.e**2) - 2, math.log(6 * math.e**3 + 1)]
        assert terms["loss"].tolist() == pytest.approx(expected, rel=1e-5)
        assert terms["acc@1"].tolist() == [1, 0]
        assert terms["acc@5"].tolist() == [1, 0]

    def test_images_are_noised_as_their_timestep_says(self, tmp_path):
        _, (asked, times), images = self.terms(tmp_path, noised=True)
        assert times.tolist() == [10, 40]
        diffusion = DIFFUSION.build()
        assert th.equal(asked, diffusion.q_sample(images, times, noise=th.ones_like(images)))


class TestConfig:
    def test_the_originals_flags_decide_the_end(self):
        config = ClassifierTrainConfig(iterations=7)
        assert (config.max_steps, config.lr_anneal_steps) == (7, 0)
        config = from_flags(ClassifierTrainConfig, {"anneal_lr": True, "iterations": 7})
        assert (config.max_steps, config.lr_anneal_steps) == (7, 7)

    @pytest.mark.parametrize("name", ["iterations", "eval_interval"])
    def test_below_one_is_refused(self, name):
        with pytest.raises(UserError, match=f"--{name} 0"):
            parse_flags(make_parser(None, ClassifierTrainConfig), [f"--{name}", "0"])


def test_held_out_scores_do_not_depend_on_microbatches(tmp_path, folder):
    images = th.randn(5, 1, 16, 16, generator=th.Generator().manual_seed(0))
    labels = {"y": th.tensor([0, 1, 2, 3, 4])}
    found = []
    for microbatch in (5, 3, 2):
        trained = loop(Logits(), tmp_path, noised=False)
        trained.microbatch = microbatch
        trained._evaluate(images, labels)
        found.append(logger.dumpkvs()["val_loss"])
    assert found[1:] == pytest.approx(found[:1] * 2)


def test_the_gradient_is_that_of_the_classes_log_probability():
    """Linear logits w x: the gradient of log p(y | x) is w_y - sum of p w."""
    w = th.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]])
    x = th.tensor([[0.3, -0.2], [1.0, 0.4]])
    y = th.tensor([2, 0])
    p = (x @ w.T).softmax(dim=1)
    with th.no_grad():  # as inside of samplers
        found = classifier_gradient(lambda x, t: x @ w.T, 2.5)(x, th.zeros(2), y=y, low_res=None)
    assert th.allclose(found, 2.5 * (w[y] - p @ w), atol=1e-6)


class TestScripts:
    def test_train_and_resume(self, script, shapes, tmp_path, monkeypatch):
        for name, steps in (("whole", (6,)), ("halves", (3, 6))):
            monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / name))
            for most in steps:
                flags = (*FLAGS, "--val_data_dir", shapes, "--eval_interval", 2)
                flags += ("--iterations", most, "--weight_decay", 0.1)
                done = script("classifier_train.py", "--data_dir", shapes, *flags)
                assert done.code == 0, done.err
        one, two = (
            checkpoint.load(str(tmp_path / name / "model000006.pt")) for name in ("whole", "halves")
        )
        assert all(th.equal(one[key], two[key]) for key in one)
        rows = {}
        for name in ("whole", "halves"):
            with open(tmp_path / name / "progress.csv") as file:
                rows[name] = [
                    {k: row[k] for k in ("step", "loss", "acc@1", "val_loss", "val_acc@1")}
                    for row in csv.DictReader(file)
                ]
        assert rows["whole"] == rows["halves"]
        assert [row["step"] for row in rows["whole"]] == ["2", "4", "6"]
        assert not list((tmp_path / "whole").glob("ema*"))

    def test_a_class_of_the_validation_set_alone(self, script, shapes, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
        (tmp_path / "val").mkdir()
        for path in shapes.iterdir():
            (tmp_path / "val" / path.name.replace("bar", "cup")).write_bytes(path.read_bytes())
        flags = (*FLAGS, "--val_data_dir", tmp_path / "val", "--iterations", 1)
        done = script("classifier_train.py", "--data_dir", shapes, *flags)
        assert done.code == 2
        assert "has class 'cup'" in done.err

    def test_samples_follow_the_classifier(self, script, tmp_path):
        model = write_trained(tmp_path / "run")
        guide = write_trained(tmp_path / "guide", CLASSIFIER, kind="classifier", classes=CLASSES)
        flags = ["--model_path", model, "--classifier_path", guide, "--num_samples", 4]
        flags += ["--steps", 5, "--class_labels", "bar,ball"]
        samples = {}
        for scale in (0, 3):
            out = tmp_path / str(scale)
            more = ("--classifier_scale", scale, "--out_dir", out)
            done = script("classifier_sample.py", *flags, *more)
            assert done.code == 0, done.err
            samples[scale] = arrays(out / "samples_4x16x16x1.npz")
        assert samples[3]["arr_1"].tolist() == [1, 0, 1, 0]
        assert not np.array_equal(samples[0]["arr_0"], samples[3]["arr_0"])
        # without guidance it is the network's own sample
        script("image_sample.py", *flags[:2], *flags[4:8], "--out_dir", tmp_path / "own")
        own = arrays(tmp_path / "own" / "samples_4x16x16x1.npz")["arr_0"]
        assert abs(own.astype(int) - samples[0]["arr_0"]).max() <= 1

    @pytest.mark.parametrize(
        ("model", "diffusion", "named"),
        [
            ({"in_channels": 3}, {}, "in_channels is 3 there and 1 here"),
            ({"image_size": 32}, {}, "image_size is 32 there and 16 here"),
            ({}, {"diffusion_steps": 60}, "diffusion_steps is 60 there and 50 here"),
            ({}, {"noise_schedule": "linear"}, "noise_schedule is linear there and cosine here"),
        ],
    )
    def test_a_classifier_of_other_images(self, script, tmp_path, model, diffusion, named):
        guide = write_trained(
            tmp_path / "guide",
            dataclasses.replace(CLASSIFIER, **model),
            dataclasses.replace(DIFFUSION, **diffusion),
            kind="classifier",
        )
        network = write_trained(tmp_path / "run", NETWORK)
        done = script(
            "classifier_sample.py", "--model_path", network, "--classifier_path", guide, *FEW
        )
        assert done.code == 2
        assert named in done.err

    def test_a_classifier_without_config_is_described_by_flags(self, script, tmp_path):
        model = write_trained(tmp_path / "run")
        guide = write_trained(tmp_path / "guide", CLASSIFIER, kind="classifier", config=False)
        flags = ("--model_path", model, "--classifier_path", guide, "--num_samples", 2)
        described = ("--classifier_width", 32, "--classifier_depth", 1, "--num_classes", 2)
        described += ("--classifier_attention_resolutions", "8")
        done = script("classifier_sample.py", *flags, *described, "--steps", 2)
        assert done.code == 0, done.err
        done = script("classifier_sample.py", *flags, *described[2:])
        assert done.code == 2
        assert "does not fit the network that its config.json or the flags describe" in done.err

    def test_a_classifier_must_be_one(self, script, tmp_path):
        model = write_trained(tmp_path / "run")
        done = script(
            "classifier_sample.py", "--model_path", model, "--classifier_path", model, *FEW
        )
        assert done.code == 2
        assert "kind diffusion, not classifier" in done.err
        done = script("classifier_sample.py", "--model_path", model)
        assert "--classifier_path is missing" in done.err
