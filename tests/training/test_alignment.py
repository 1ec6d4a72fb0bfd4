"""Features aligned with an encoder's: what is compared, what trains, and resuming."""

import dataclasses
import json

import pytest
import torch as th
import torch.nn.functional as F
from alignment_util import TinyEncoder
from loop_util import TINY, WIDE, furthest, logged_losses, new_loop, rows, run_in, weights

from guided_diffusion import logger
from guided_diffusion.networks import encoders
from guided_diffusion.networks.alignment import (
    AlignedNetwork,
    Site,
    Targets,
    alignment_sites,
)
from guided_diffusion.networks.config import ModelConfig
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.train_util import find_start
from guided_diffusion.training import diffusion
from guided_diffusion.training.alignment import AlignedLoop

CPU = th.device("cpu")


def options(
    weight: float = 0.5, targets: Targets | None = None, config: ModelConfig = TINY, **more
) -> dict:
    """What `new_loop` takes for an aligned run."""
    th.manual_seed(1)
    model, targets = config.build(), targets or Targets(TinyEncoder(), CPU)
    wrapper = AlignedNetwork(model, alignment_sites(config), targets.width)
    own = {"model": model, "wrapper": wrapper, "targets": targets, "weight": weight}
    return {"loop_type": AlignedLoop, **own, **more}


def images(count: int = 2, size: int = 8) -> th.Tensor:
    return th.rand(count, 1, size, size, generator=th.Generator().manual_seed(2)) * 2 - 1


class TestSites:
    def test_the_middle_and_the_last_decoder_block_at_16_pixels(self):
        config = ModelConfig(
            image_size=64, in_channels=1, num_channels=32, num_res_blocks=1, resblock_updown=True
        )
        assert alignment_sites(config) == [Site("middle_block", 128), Site("output_blocks.2", 96)]
        config = dataclasses.replace(config, class_cond=True, num_classes=3, resblock_updown=False)
        assert alignment_sites(config)[1] == Site("output_blocks.2", 96)

    def test_of_a_network_with_larger_features_alone(self):
        config = dataclasses.replace(TINY, image_size=32)
        assert alignment_sites(config)[0].name == "middle_block"
        assert alignment_sites(config)[1].name == "output_blocks.1"


class TestTargets:
    def test_of_an_image_are_computed_once_and_by_itself(self):
        encoder, batch = TinyEncoder(), images(3)
        targets = Targets(encoder, CPU)
        first = targets(batch)
        assert first.shape == (3, 5, 12, 12)
        assert targets.width == 5
        assert encoder.seen == [1, 1, 1]
        assert th.equal(targets(batch.flip(0)), first.flip(0))
        assert encoder.seen == [1, 1, 1]
        targets(batch.flip(3))  # other images
        assert encoder.seen == [1] * 6

    def test_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr("guided_diffusion.networks.alignment._KEPT_BYTES", 1)
        encoder = TinyEncoder()
        targets = Targets(encoder, CPU)
        first = targets(images(3))
        assert th.equal(targets(images(3)), first)
        assert encoder.seen == [1] * 5  # only the first is kept


class TestNetwork:
    def aligned(self) -> tuple[th.nn.Module, AlignedNetwork]:
        made = options()
        return made["model"], made["wrapper"]

    def test_output_and_state_dict_of_the_network_stay(self):
        model, aligned = self.aligned()
        th.manual_seed(1)
        plain = TINY.build()
        assert list(model.state_dict()) == list(plain.state_dict())
        assert furthest(model.state_dict(), plain.state_dict()) == 0
        x, ts = images(), th.tensor([3, 7])
        assert th.equal(aligned(x, ts), plain(x, ts))

    def test_distance(self):
        _, aligned = self.aligned()
        found = []
        for head in aligned.heads:
            head.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        aligned(images(), th.tensor([3, 7]))
        targets = Targets(TinyEncoder(), CPU)(images())
        wanted = F.interpolate(targets, (8, 8), mode="bilinear", antialias=True)
        each = [
            1 - (p * wanted).sum(1) / (p.norm(dim=1) * wanted.norm(dim=1)) for p in found
        ]  # [N x h x w]
        expected = th.stack(each).mean((0, 2, 3))
        th.testing.assert_close(aligned.distances(targets), expected)

    def test_gradients_reach_the_network_up_to_the_site(self):
        model, aligned = self.aligned()
        aligned(images(), th.tensor([3, 7]))
        aligned.distances(Targets(TinyEncoder(), CPU)(images())).mean().backward()
        got = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        for name in ("input_blocks.0.0.weight", "middle_block.0.out_layers.3.weight"):
            assert name in got
        assert not any(name.startswith("out.") for name in got)
        assert all(p.grad.any() for p in aligned.heads.parameters())

    def test_evaluation_leaves_nothing_behind(self):
        model, aligned = self.aligned()
        model.eval()
        model(images(), th.tensor([3, 7]))
        assert aligned._features == []


class TestRun:
    def test_the_loss_counts_the_distance(self, tmp_path):
        run_in(tmp_path, 4, more=lambda: options(weight=0.25))
        for row in rows(tmp_path):
            whole = float(row["mse"]) + float(row["vb"]) + 0.25 * float(row["align"])
            assert float(row["loss"]) == pytest.approx(whole, rel=1e-5)
        assert float(rows(tmp_path)[-1]["align"]) < float(rows(tmp_path)[0]["align"])

    def test_of_no_weight_trains_as_without(self, tmp_path):
        plain = run_in(tmp_path / "plain", 3, config=WIDE, max_grad_norm=0.0)
        more = {"weight": 0.0, "config": WIDE, "max_grad_norm": 0.0}
        aligned = run_in(tmp_path / "run", 3, more=lambda: options(**more))
        assert furthest(weights(plain), weights(aligned)) < 1e-6

    def test_resuming_leaves_no_trace(self, tmp_path):
        def more():
            return options(microbatch=3, log_interval=3, save_interval=4, weight_decay=0.1)

        run_in(tmp_path / "whole", 11, more=more)
        run_in(tmp_path / "parts", 4, 5, 11, more=more)
        last = [f"{name}000011.pt" for name in ("model", "ema_0.5_", "ema_0.9_", "opt", "state")]
        for name in last:
            ours, theirs = ((tmp_path / part / name).read_bytes() for part in ("whole", "parts"))
            assert ours == theirs, name
        assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")

    def test_its_checkpoints_are_those_of_the_network(self, tmp_path):
        run_in(tmp_path / "plain", 2)
        run_in(tmp_path / "run", 2, more=options)
        for name in ("model000002.pt", "ema_0.9_000002.pt"):
            plain, aligned = (checkpoint.load(str(tmp_path / f / name)) for f in ("plain", "run"))
            assert {k: v.shape for k, v in plain.items()} == {
                k: v.shape for k, v in aligned.items()
            }
        plain, aligned = (
            checkpoint.load(str(tmp_path / f / "opt000002.pt")) for f in ("plain", "run")
        )
        assert plain["state"].keys() == aligned["state"].keys()
        assert plain["param_groups"] == aligned["param_groups"]

    @pytest.mark.parametrize("aligned_first", [True, False])
    def test_alignment_may_begin_or_end_in_another_folder(self, tmp_path, capsys, aligned_first):
        run_in(tmp_path / "one", 3, more=options if aligned_first else dict)
        start = find_start(str(tmp_path / "two"), str(tmp_path / "one" / "model000003.pt"))
        logger.configure(str(tmp_path / "two"), ["stdout"], resume_step=start.step)
        loop = new_loop(start=start, max_steps=5, **({} if aligned_first else options()))
        moments = checkpoint.load(str(tmp_path / "one" / "opt000003.pt"))["state"]
        ours = loop.stepper.optimizer_state()["state"]
        assert all(th.equal(ours[i]["exp_avg"], moments[i]["exp_avg"]) for i in moments)
        loop.run_loop()
        logger.reset()
        said = "the heads start from random weights"
        assert (said in capsys.readouterr().out) != aligned_first

    def test_heads_for_another_encoder(self, tmp_path):
        run_in(tmp_path, 1, more=options)
        other = Targets(TinyEncoder(), CPU)
        other.width = 6
        with pytest.raises(UserError, match="heads have other shapes: they were trained for anoth"):
            new_loop(start=find_start(str(tmp_path)), **options(targets=other))

    def test_what_is_not_finite_is_named(self, tmp_path):
        made = options(max_skipped_steps=2)
        with th.no_grad():
            made["wrapper"].heads[1][0].weight[0, 0] = float("nan")
        loop = new_loop(**made)
        with pytest.raises(UserError, match=r"loss terms .*align; layer heads\.1\.0 is the first"):
            loop.run_loop()


class TestScript:
    def test_recorded_and_not_to_be_changed(self, script, split, tmp_path, monkeypatch):
        monkeypatch.setattr(diffusion, "open_encoder", lambda name, side: TinyEncoder())
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        flags = ("--image_size", 16, "--num_channels", 16, "--channel_mult", "1")
        flags += ("--num_res_blocks", 1, "--attention_resolutions", "8", "--num_heads", 1)
        flags += ("--data_dir", split / "TRAIN" / "IMG", "--batch_size", 2, "--sample_interval", 1)
        flags += (
            "--noise_schedule",
            "cosine",
            "--diffusion_steps",
            10,
            "--log_interval",
            1,
            "--save_interval",
            1,
        )
        aligned = (*flags, "--align_encoder", "efficientnet-lite0")
        ended = script("image_train.py", *aligned, "--max_steps", 1)
        assert ended.code == 0, ended.err
        training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
        assert (training["align_encoder"], training["align_weight"]) == ("efficientnet-lite0", 0.5)
        ended = script("image_train.py", *flags, "--max_steps", 2)
        assert ended.code == 2
        assert "--align_encoder '' contradicts the run in" in ended.err
        ended = script("image_train.py", *aligned, "--align_weight", 1, "--max_steps", 2)
        assert ended.code == 0, ended.err
        history = json.loads((tmp_path / "run" / "config.json").read_text())["history"]
        assert history[0]["changed"] == ["align_weight 1.0 instead of 0.5"]

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--align_encoder", "nosuch"), "--align_encoder nosuch: there is no such encoder"),
            (
                ("--align_encoder", "x", "--segmentation_guided", "True", "--seg_dir", "y"),
                "--align_encoder does not apply to --segmentation_guided True",
            ),
        ],
    )
    def test_wrong_flags(self, script, split, tmp_path, monkeypatch, flags, said):
        monkeypatch.setenv("OPENAI_LOGDIR", "run")
        ended = script("image_train.py", "--data_dir", split / "TRAIN" / "IMG", *flags)
        assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1), ended.err
        assert said in ended.err
        assert not (tmp_path / "run").exists()


class TestEncoders:
    def test_by_name(self, monkeypatch):
        timm = pytest.importorskip("timm")
        create = timm.create_model

        def without_download(name, pretrained, **more):
            return create(name, **more)

        monkeypatch.setattr(timm, "create_model", without_download)
        encoder = encoders.open_encoder("resnet18", 64)
        assert isinstance(encoder, encoders.TimmEncoder)
        assert encoder.strides == (2, 4, 8, 16, 32)
        maps = encoder(th.zeros(1, 3, 64, 64))
        assert [m.shape[1] for m in maps] == list(encoder.widths)
        assert Targets(encoder, CPU).width == 256

    def test_without_a_network(self, monkeypatch):
        timm = pytest.importorskip("timm")

        def offline(*args, **more):
            raise FileNotFoundError("no connection")

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(UserError, match=r"resnet18: cannot download its weights .*offline c"):
            encoders.open_encoder("resnet18", 64)

    def test_that_takes_no_such_images(self, monkeypatch):
        timm = pytest.importorskip("timm")

        def refuses(*args, **more):
            raise AssertionError("Input height (64) doesn't match model (224).")

        monkeypatch.setattr(timm, "create_model", refuses)
        with pytest.raises(UserError, match=r"of 64 x 64 pixels \(Input height .64. doesn't match"):
            encoders.open_encoder("vit_base_patch16_224", 64)
