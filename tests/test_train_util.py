"""guided_diffusion.train_util: the diffusion training loop, in one process."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch as th
from loop_util import DIFFUSION, TINY, WIDE, batches, furthest, names, new_loop, rows, weights

from guided_diffusion import logger
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.train_util import LoopConfig, TrainLoop, log_loss_dict, parse_ema_rates


class TestGradients:
    @pytest.mark.parametrize("microbatch", [1, 2, 3])
    def test_microbatches_are_averaged_by_their_sizes(self, folder, microbatch):
        whole = new_loop(WIDE, 5, lr=1e-4)
        parts = new_loop(WIDE, 5, lr=1e-4, microbatch=microbatch)
        for images, cond in itertools.islice(batches(size=5), 5):
            whole.run_step(images, cond)
            parts.run_step(images, cond)
        assert furthest(weights(whole), weights(parts)) < 1e-6
        assert furthest(weights(whole), new_loop(WIDE).model.state_dict()) > 1e-4

    def test_all_microbatches_of_a_step_draw_from_one_distribution(self, folder):
        ends = []
        for microbatch in (-1, 1, 3):
            sampler = LossSecondMomentResampler(DIFFUSION.build(), history_per_term=1)
            for t in range(20):  # beyond the uniform start
                sampler.update_with_all_losses([t], [1.0 + t])
            loop = new_loop(WIDE, 5, lr=1e-4, microbatch=microbatch, schedule_sampler=sampler)
            for images, cond in itertools.islice(batches(size=5), 3):
                loop.run_step(images, cond)
            ends.append((weights(loop), sampler.weights()))
        for state, distribution in ends[1:]:
            assert furthest(state, ends[0][0]) < 1e-6
            np.testing.assert_allclose(distribution, ends[0][1], rtol=1e-4)

    @pytest.mark.parametrize("what", [True, "norms"])
    def test_recomputed_activations_give_the_same_gradients(self, folder, what):
        kept = new_loop(max_grad_norm=0)
        recomputed = new_loop(dataclasses.replace(TINY, use_checkpoint=what), max_grad_norm=0)
        for images, cond in itertools.islice(batches(), 2):
            kept.forward_backward(images, cond)
            recomputed.forward_backward(images, cond)
            pairs = zip(kept.model.named_parameters(), recomputed.model.parameters())
            for (name, ours), theirs in pairs:
                assert th.equal(ours.grad, theirs.grad), name
            kept.stepper.step()
            recomputed.stepper.step()

    def test_dropout_is_a_function_of_the_step(self, folder):
        config = dataclasses.replace(TINY, dropout=0.3)
        ends = []
        for _ in range(2):
            loop = new_loop(config, microbatch=3)
            for images, cond in itertools.islice(batches(), 2):
                loop.run_step(images, cond)
                th.rand(7)  # whatever else draws random numbers
            ends.append(weights(loop))
        assert furthest(*ends) == 0
        seeds = set()
        for loop.step in (0, 1):
            for first in (0, 3):
                loop.losses(loop.model, images, cond, slice(first, first + 3))
                seeds.add(th.initial_seed())
        assert len(seeds) == 4

    def test_the_loss_is_what_the_diffusion_says(self, folder):
        """One row of a batch, drawn by hand."""
        from guided_diffusion.runtime import rng

        loop = new_loop(seed=7)
        images, cond = next(batches())
        loop.step = 3
        ts, importance, terms = loop.losses(loop.model, images, cond, slice(1, 3))
        numbers = [3 * 4 + 1, 3 * 4 + 2]
        expected = (rng.uniforms(7, "timestep", numbers) * 20).astype(int)
        assert ts.tolist() == expected.tolist()
        assert importance.tolist() == [1, 1]
        noise = rng.normal(7, "noise", numbers, (1, 8, 8))
        direct = loop.diffusion.training_losses(loop.model, images[1:3], ts, noise=noise)
        assert th.equal(terms["loss"], direct["loss"])

    def test_the_original_call(self, folder):
        """The original's arguments and nothing else, with an iterator of batches."""
        loop = TrainLoop(
            model=TINY.build(),
            diffusion=DIFFUSION.build(),
            data=batches(),
            batch_size=4,
            microbatch=-1,
            lr=1e-3,
            ema_rate=0.9,
            log_interval=2,
            save_interval=2,
            resume_checkpoint="",
            use_fp16=False,
            fp16_scale_growth=1e-3,
            schedule_sampler=None,
            weight_decay=0.0,
            lr_anneal_steps=4,
        )
        loop.run_loop()
        assert names(folder) == [
            f"{prefix}00000{step}.pt"
            for prefix in ("ema_0.9_", "model", "opt", "state")
            for step in (2, 4)
        ]
        assert [row["lr"] for row in rows(folder)] == ["0.00075", "0.00025"]
        assert loop.settings.max_grad_norm == 0  # the original does not clip

    def test_settings_and_fields_that_replace_them(self, folder, tmp_path):
        settings = LoopConfig(lr=1e-3, max_steps=1, ema_rate="")
        place = tmp_path / "elsewhere"
        loop = TrainLoop(
            model=TINY.build(),
            diffusion=DIFFUSION.build(),
            data=batches(),
            settings=settings,
            folder=str(place),
            lr=1e-4,
        )
        assert loop.settings == dataclasses.replace(settings, lr=1e-4)
        loop.run_loop()
        assert names(place) == ["model000001.pt", "opt000001.pt", "state000001.pt"]
        assert names(folder) == []
        with pytest.raises(TypeError, match="learning_rate"):
            new_loop(learning_rate=1e-4)


class TestFiles:
    def test_state_dicts_under_the_originals_names(self, folder):
        loop = new_loop(max_steps=3, save_interval=2)
        loop.run_loop()
        expected = [
            f"{prefix}00000{step}.pt"
            for prefix in ("ema_0.5_", "ema_0.9_", "model", "opt", "state")
            for step in (2, 3)
        ]
        assert names(folder) == expected
        saved = checkpoint.load(str(folder / "model000003.pt"))
        assert furthest(saved, loop.model.state_dict()) == 0
        average = checkpoint.load(str(folder / "ema_0.9_000003.pt"))
        assert furthest(average, loop.stepper.weights_as_state_dict(loop.stepper.ema[0.9])) == 0
        assert all(value.dtype == th.float32 for value in (*saved.values(), *average.values()))
        opt = checkpoint.load(str(folder / "opt000003.pt"))
        # what the original's AdamW reads
        fresh = th.optim.AdamW(TINY.build().parameters(), lr=1e-3)
        fresh.load_state_dict(opt)
        fresh.step()

    def test_none_at_the_start_unless_asked(self, folder):
        new_loop(max_steps=1, save_initial=True).run_loop()
        assert "model000000.pt" in names(folder)
        saved = checkpoint.load(str(folder / "model000000.pt"))
        assert furthest(saved, new_loop().model.state_dict()) == 0

    def test_old_ones_go(self, folder):
        new_loop(max_steps=7, save_interval=2, keep_checkpoints=2, ema_rate="").run_loop()
        assert names(folder) == [
            f"{prefix}00000{step}.pt" for prefix in ("model", "opt", "state") for step in (6, 7)
        ]

    def test_samples_see_averaged_weights(self, folder):
        seen = []

        def sample(network, step):
            seen.append((step, network.training, copy.deepcopy(network.state_dict())))

        loop = new_loop(max_steps=5, sample_interval=2, sample_fn=sample)
        loop.run_loop()
        assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)]
        again = new_loop(max_steps=4)
        again.run_loop()
        average = again.stepper.weights_as_state_dict(again.stepper.ema[0.9])
        assert furthest(seen[1][2], average) == 0
        assert furthest(seen[1][2], weights(again)) > 0
        assert loop.model.training

    def test_rates(self):
        assert parse_ema_rates(0.9999) == {"0.9999": 0.9999}
        assert parse_ema_rates("0.9990, .5,") == {"0.999": 0.999, "0.5": 0.5}
        assert parse_ema_rates("") == {}
        for wrong in ("0.9;0.99", "1.5", "-0.1", "nan"):
            with pytest.raises(UserError, match=f"--ema_rate {wrong}: expected numbers between"):
                parse_ema_rates(wrong)


class TestLog:
    def test_means_over_samples_by_quarters(self, folder):
        diffusion = DIFFUSION.build()
        log_loss_dict(diffusion, th.tensor([0, 4, 5, 19]), {"mse": th.tensor([1.0, 2, 4, 9])})
        log_loss_dict(diffusion, th.tensor([0]), {"mse": th.tensor([9.0])})
        expected = {"mse": 5.0, "mse_q0": 4.0, "mse_q1": 4.0, "mse_q3": 9.0}
        assert logger.getkvs() == expected

    def test_a_row(self, folder):
        new_loop(max_steps=4, log_interval=2, lr_anneal_steps=8).run_loop()
        first, second = rows(folder)
        assert (first["step"], second["step"]) == ("2", "4")
        assert (first["samples"], second["samples"]) == ("8", "16")
        assert float(second["lr"]) == pytest.approx(1e-3 * 5 / 8)
        assert float(first["loss"]) == pytest.approx(float(first["mse"]) + float(first["vb"]))
        assert first["skipped_steps"] == "0"
        assert "loss_scale" not in first
        assert float(first["images_per_second"]) > 0

    def test_labels_reach_the_network(self, folder):
        config = dataclasses.replace(TINY, class_cond=True, num_classes=3)
        data = {"y": lambda step, size: (th.arange(size) + step) % 3}
        loop = new_loop(config, data=batches(**data), max_steps=4, microbatch=3)
        before = weights(loop)["label_emb.weight"]
        loop.run_loop()
        assert (weights(loop)["label_emb.weight"] != before).any(1).all()
