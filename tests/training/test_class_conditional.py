"""Classes from file names: in training, in config.json, in sampling with guidance."""

import dataclasses
import json

import numpy as np
import pytest
import torch as th
from PIL import Image
from sampling_util import CLASSES, NETWORK, arrays, write_shapes, write_trained

from guided_diffusion.image_datasets import class_labels, load_data
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.sampling.guidance import ClassifierFree
from guided_diffusion.training.diffusion import drop_classes

TWO = dataclasses.replace(NETWORK, class_cond=True, num_classes=2)
FREE = dataclasses.replace(TWO, cond_drop_prob=0.25)
FLAGS = (
    *("--image_size", 16, "--num_channels", 16, "--num_res_blocks", 1, "--num_heads", 2),
    *("--channel_mult", "1,2", "--attention_resolutions", "8", "--learn_sigma", "True"),
    *("--diffusion_steps", 50, "--noise_schedule", "cosine", "--ema_rate", "0.9"),
    *("--batch_size", 4, "--class_cond", "True", "--num_classes", 3, "--cond_drop_prob", 0.3),
    *("--sample_interval", 0, "--log_interval", 100, "--save_interval", 100),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def weights(folder, step):
    return checkpoint.load(str(folder / f"model{step:06d}.pt"))


class TestLabels:
    def test_they_are_the_prefixes_in_sorted_order(self, shapes):
        _, cond = next(
            load_data(
                data_dir=str(shapes),
                batch_size=8,
                image_size=16,
                class_cond=True,
                deterministic=True,
            )
        )
        assert cond["y"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]

    def test_a_list_of_names_decides_their_numbers(self, shapes):
        _, cond = next(
            load_data(
                data_dir=str(shapes / "bar*"),
                batch_size=4,
                image_size=16,
                class_cond=True,
                classes=("arc", "ball", "bar"),
            )
        )
        assert cond["y"].tolist() == [2, 2, 2, 2]

    def test_a_file_of_another_class_is_named(self):
        with pytest.raises(UserError, match=r"data/cup_3\.png has class 'cup'.*ball, bar"):
            class_labels(["data/ball_0.png", "data/cup_3.png"], CLASSES)


class TestDropping:
    def batches(self, count=50, size=8):
        return iter([(th.zeros(size, 1), {"y": th.arange(size)})] * count)

    def test_the_share_is_what_was_asked_for(self):
        dropped = [c["y"] == 9 for _, c in drop_classes(self.batches(), 0.3, 9, 0, 0)]
        assert th.stack(dropped).float().mean() == pytest.approx(0.3, abs=0.07)

    def test_others_keep_their_class(self):
        for _, cond in drop_classes(self.batches(), 0.3, 9, 0, 0):
            kept = cond["y"] != 9
            assert th.equal(cond["y"][kept], th.arange(8)[kept])

    def test_it_depends_on_the_number_of_the_image_alone(self, monkeypatch):
        whole = [c["y"] for _, c in drop_classes(self.batches(), 0.5, 9, 1, 0)]
        later = [c["y"] for _, c in drop_classes(self.batches(45), 0.5, 9, 1, 5)]
        assert th.equal(th.stack(whole[5:]), th.stack(later))
        from guided_diffusion import dist_util

        monkeypatch.setattr(dist_util, "world_size", lambda: 2)
        halves = []
        for rank in range(2):
            monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
            halves.append([c["y"] == 9 for _, c in drop_classes(self.batches(5, 4), 0.5, 9, 1, 0)])
        together = [th.cat(parts) for parts in zip(*halves)]
        assert th.equal(th.stack(together), th.stack(whole[:5]) == 9)


class TestTheNetwork:
    def test_the_class_for_no_class_is_one_row_more_and_only_where_it_is_used(self):
        with th.device("meta"):
            rows = [config.build().label_emb.weight.shape[0] for config in (TWO, FREE)]
        assert rows == [2, 3]

    @pytest.mark.parametrize(
        "values",
        [
            {"class_cond": True, "cond_drop_prob": 1.5},
            {"class_cond": True, "cond_drop_prob": -0.1},
            {"class_cond": False, "cond_drop_prob": 0.1},
        ],
    )
    def test_impossible_shares_are_refused(self, values):
        with pytest.raises(UserError, match="cond_drop_prob"), th.device("meta"):
            ModelConfig(num_channels=32, **values).build()


class TestGuidance:
    """A network whose answer is its class, with a variance channel that is ten times it."""

    @staticmethod
    def network(x, timesteps, y, **kwargs):
        value = y.float()[:, None, None, None].expand_as(x)
        return th.cat([value, 10 * value], dim=1)

    def predict(self, scale):
        guide = ClassifierFree(self.network, scale, null=5)
        return guide(th.zeros(2, 1, 4, 4), th.zeros(2), y=th.tensor([0, 3]))

    def test_a_scale_of_one_is_the_network_itself(self):
        expected = self.network(th.zeros(2, 1, 4, 4), None, th.tensor([0, 3]))
        assert th.allclose(self.predict(1.0), expected)

    @pytest.mark.parametrize(("scale", "values"), [(0.0, (5, 5)), (3.0, (-10, -1))])
    def test_predictions_lean_away_from_no_class(self, scale, values):
        predicted = self.predict(scale)
        assert predicted[:, 0, 0, 0].tolist() == pytest.approx(values)

    def test_the_variance_stays_that_with_the_class(self):
        assert self.predict(3.0)[:, 1, 0, 0].tolist() == [0, 30]


class TestScripts:
    def test_train_resume_and_sample(self, script, shapes, tmp_path, monkeypatch):
        for name, steps in (("whole", (6,)), ("halves", (3, 6))):
            monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / name))
            for most in steps:
                done = script("image_train.py", "--data_dir", shapes, *FLAGS, "--max_steps", most)
                assert done.code == 0, done.err
        assert "2 classes: ball, bar" in done.err
        one, two = (weights(tmp_path / name, 6) for name in ("whole", "halves"))
        assert one["label_emb.weight"].shape[0] == 4
        assert all(th.equal(one[key], two[key]) for key in one)
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        assert config["classes"] == ["ball", "bar"]
        assert config["model"]["cond_drop_prob"] == 0.3

        monkeypatch.delenv("OPENAI_LOGDIR")
        model = tmp_path / "whole" / "ema_0.9_000006.pt"
        flags = ("--model_path", model, "--num_samples", 5, "--steps", 4)
        outs = []
        for name, labels, scale in (("a", "bar,0", 1), ("b", "bar,ball", 4), ("c", "", 1)):
            out = tmp_path / name
            asked = ("--class_labels", labels, "--guidance_scale", scale, "--out_dir", out)
            done = script("image_sample.py", *flags, *asked)
            assert done.code == 0, done.err
            outs.append(arrays(out / "samples_5x16x16x1.npz"))
        assert outs[0]["arr_1"].tolist() == outs[1]["arr_1"].tolist() == [1, 0, 1, 0, 1]
        assert not np.array_equal(outs[0]["arr_0"], outs[1]["arr_0"])
        assert set(outs[2]["arr_1"].tolist()) <= {0, 1}

    def test_another_class_in_a_resumed_run(self, script, shapes, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
        flags = ("image_train.py", "--data_dir", tmp_path / "data", *FLAGS)
        write_shapes(tmp_path / "data")
        assert script(*flags, "--max_steps", 1).code == 0
        Image.new("L", (16, 16)).save(tmp_path / "data" / "arc_0.png")
        done = script(*flags, "--max_steps", 2)
        assert done.code == 2
        assert "arc_0.png has class 'arc'" in done.err
        for path in (tmp_path / "data").glob("a*"):
            path.unlink()
        for path in (tmp_path / "data").glob("ball_*"):
            path.rename(path.with_name(path.name.replace("ball", "bar")))
        assert script(*flags, "--max_steps", 2).code == 0
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["classes"] == ["ball", "bar"]

    def test_more_classes_than_the_network_has(self, script, shapes, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
        done = script("image_train.py", "--data_dir", shapes, *FLAGS, "--num_classes", 1)
        assert done.code == 2
        assert "2 classes (ball, bar)" in done.err
        assert "--num_classes 1" in done.err
        assert not (tmp_path / "run").exists()

    def test_guidance_needs_training_without_classes(self, script, tmp_path):
        model = write_trained(tmp_path / "run", TWO, classes=CLASSES)
        flags = ("--model_path", model, "--num_samples", 1, "--steps", 2)
        done = script("image_sample.py", *flags, "--guidance_scale", 2)
        assert done.code == 2
        assert "without --cond_drop_prob" in done.err
        assert script("image_sample.py", *flags, "--class_labels", "cup").code == 2
