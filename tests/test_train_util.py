"""guided_diffusion.train_util: the diffusion training loop, in one process."""

import copy
import csv
import dataclasses
import itertools

import numpy as np
import pytest
import torch as th

from guided_diffusion import logger
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.runtime import checkpoint
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.train_util import (
    Start,
    TrainLoop,
    find_ema_checkpoint,
    find_resume_checkpoint,
    find_start,
    log_loss_dict,
    parse_ema_rates,
    parse_resume_step_from_filename,
)

TINY = ModelConfig(
    image_size=8,
    in_channels=1,
    num_channels=16,
    num_res_blocks=1,
    channel_mult="1",
    attention_resolutions="8",
    num_head_channels=8,
    learn_sigma=True,
)
# 64 channels are two in a group of the normalisation: with one, a bias before it has no effect and
# a gradient of rounding errors alone, which AdamW blows up to full steps.
WIDE = dataclasses.replace(TINY, num_channels=64)
DIFFUSION = DiffusionConfig(learn_sigma=True, diffusion_steps=20, noise_schedule="cosine")


def batches(first: int = 0, size: int = 4, **extra):
    """Batches from step `first` on, each a function of its step."""
    for step in itertools.count(first):
        images = np.random.default_rng(step).uniform(-1, 1, (size, 1, 8, 8))
        yield th.from_numpy(images).float(), {k: v(step, size) for k, v in extra.items()}


@pytest.fixture
def folder(tmp_path):
    """The run's folder, logged into."""
    logger.configure(str(tmp_path / "run"), ["csv"])
    yield tmp_path / "run"
    logger.reset()


def new_loop(config: ModelConfig = TINY, size: int = 4, **options) -> TrainLoop:
    th.manual_seed(1)
    defaults = {
        "model": config.build(),
        "diffusion": DIFFUSION.build(),
        "data": lambda first: batches(first, size),
        "batch_size": size,
        "microbatch": -1,
        "lr": 1e-3,
        "ema_rate": "0.5,0.9",
        "log_interval": 1,
        "save_interval": 1000,
        "start": Start(),
        "max_grad_norm": 1.0,
    }
    return TrainLoop(**{**defaults, **options})


def weights(loop: TrainLoop) -> dict[str, th.Tensor]:
    return copy.deepcopy(loop.model.state_dict())


def furthest(these: dict, those: dict) -> float:
    assert list(these) == list(those)
    return max(float((these[k] - those[k]).abs().max()) for k in these)


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


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


class TestFinding:
    @pytest.mark.parametrize(
        ("name", "step"),
        [
            ("model010000.pt", 10000),
            ("/a/model1/model1234567.pt", 1234567),
            ("gs://bucket/run/ema_0.9999_000020.pt", 20),
            ("opt000020.pt", 0),
            ("256x256_diffusion.pt", 0),
            ("model.pt", 0),
            ("model10.pth", 0),
        ],
    )
    def test_step_in_a_name(self, name, step):
        assert parse_resume_step_from_filename(name) == step

    def test_in_the_runs_folder(self, folder):
        assert find_resume_checkpoint() is None
        assert find_start(str(folder)) == Start()
        new_loop(max_steps=4, save_interval=2).run_loop()
        path = str(folder / "model000004.pt")
        assert find_resume_checkpoint() == path
        for word in ("", "auto"):
            start = find_start(str(folder), word)
            assert (start.step, start.path) == (4, path)
        assert find_ema_checkpoint(path, 4, 0.9) == str(folder / "ema_0.9_000004.pt")
        assert find_ema_checkpoint(path, 4, 0.99) is None
        assert find_ema_checkpoint(None, 4, 0.9) is None
        with pytest.raises(UserError, match="up to step 4, which --resume_checkpoint none would"):
            find_start(str(folder), "none")

    def test_a_named_file(self, folder, tmp_path):
        new_loop(max_steps=4, save_interval=2).run_loop()
        other = str(tmp_path / "other")
        path = str(folder / "model000002.pt")
        start = find_start(other, path)
        assert (start.step, start.path) == (2, path)
        assert start.state is not None
        average = str(folder / "ema_0.9_000002.pt")
        assert find_start(other, average) == Start(2, average, None)
        # in its own folder the run is further on: this is its command, given again
        assert find_start(str(folder), path).step == 4
        with pytest.raises(UserError, match=r"model000009\.pt: there is no such file"):
            find_start(other, str(folder / "model000009.pt"))

    def test_models_of_the_original_are_not_written_over(self, tmp_path):
        th.save(TINY.build().state_dict(), tmp_path / "model000010.pt")
        with pytest.raises(UserError, match=r"start from it with --resume_checkpoint .*000010\.pt"):
            find_start(str(tmp_path), "auto")
        assert find_start(str(tmp_path), str(tmp_path / "model000010.pt")).step == 10


def logged_losses(folder) -> list[dict[str, str]]:
    """The rows without what depends on the clock."""
    clock = ("seconds_per_step", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(folder)]


def run_in(path, *ends: int, more=dict, **options) -> TrainLoop:
    """A run that is stopped at the steps `ends` and started again by the same command.

    :param more: gives further options, anew for each start.
    """
    for end in ends:
        start = find_start(str(path))
        logger.configure(str(path), ["csv"], resume_step=start.step)
        loop = new_loop(start=start, max_steps=end, **options, **more())
        loop.run_loop()
        logger.reset()
    return loop


def files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".csv"))


class TestResume:
    @pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
    def test_it_leaves_no_trace(self, tmp_path, sampler):
        def options():
            diffusion = dataclasses.replace(DIFFUSION, diffusion_steps=2).build()
            by_loss = LossSecondMomentResampler(diffusion, history_per_term=3)
            return {
                "diffusion": diffusion,
                "schedule_sampler": by_loss if sampler != "uniform" else None,
                "microbatch": 3,
                "log_interval": 3,
                "save_interval": 4,
                "weight_decay": 0.1,
            }

        whole = run_in(tmp_path / "whole", 14, more=options)
        parts = run_in(tmp_path / "parts", 4, 5, 11, 14, more=options)
        last = [f"{name}000014.pt" for name in ("model", "ema_0.5_", "ema_0.9_", "opt", "state")]
        for name in last:
            ours, theirs = ((tmp_path / part / name).read_bytes() for part in ("whole", "parts"))
            assert ours == theirs, name
        assert furthest(weights(whole), weights(parts)) == 0
        assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")
        assert [row["step"] for row in rows(tmp_path / "parts")] == ["3", "6", "9", "12"]
        if sampler != "uniform":
            assert (whole.schedule_sampler.weights() != 1).any()  # it had warmed up

    def test_rows_of_steps_taken_again_go(self, tmp_path):
        run_in(tmp_path / "whole", 6, save_interval=2)
        with pytest.raises(KeyboardInterrupt):  # at step 3, a checkpoint behind
            run_in(tmp_path / "parts", 6, save_interval=2, data=interrupted(3))
        run_in(tmp_path / "parts", 6, save_interval=2)
        assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")
        with open(tmp_path / "parts" / "progress_superseded.csv") as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["3"]

    def test_a_finished_run_is_left_alone(self, tmp_path):
        run_in(tmp_path, 3)
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(tmp_path)}
        run_in(tmp_path, 3)
        after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(tmp_path)}
        assert after == before

    def test_also_before_the_first_checkpoint(self, tmp_path):
        run_in(tmp_path / "whole", 3)
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path / "parts", 3, data=interrupted(2))
        run_in(tmp_path / "parts", 3)
        assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")

    def test_a_damaged_checkpoint_is_passed_over(self, tmp_path):
        whole = run_in(tmp_path / "whole", 6, save_interval=2)
        run_in(tmp_path / "parts", 4, save_interval=2)
        (tmp_path / "parts" / "opt000004.pt").write_bytes(b"broken")
        with pytest.warns(UserWarning, match="step 4 is unusable: .*opt000004.pt is damaged"):
            parts = run_in(tmp_path / "parts", 6, save_interval=2)
        assert furthest(weights(whole), weights(parts)) == 0
        assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")
        assert find_start(str(tmp_path / "parts")).step == 6

    def test_a_changed_seed_is_told(self, tmp_path, capsys):
        run_in(tmp_path, 2)
        start = find_start(str(tmp_path))
        logger.configure(str(tmp_path), ["stdout"])
        new_loop(start=start, seed=5, size=2)
        logger.reset()
        said = capsys.readouterr().out
        assert "seed was 0 and is now 5: training continues on other images" in said
        assert "global_batch was 4 and is now 2: training continues on other images" in said

    def test_another_network(self, tmp_path):
        run_in(tmp_path, 1)
        with pytest.raises(UserError, match=r"model000001\.pt does not fit the network .*size mi"):
            new_loop(
                dataclasses.replace(TINY, num_channels=32),
                start=find_start(str(tmp_path)),
            )


def interrupted(at: int):
    """Data that end with Ctrl-C before step `at` + 1."""

    def data(first):
        for step, batch in enumerate(batches(first), first):
            if step == at:
                raise KeyboardInterrupt
            yield batch

    return data


class TestOriginalCheckpoints:
    """Files as the original package leaves them: no state, no config.json, an older AdamW."""

    @pytest.fixture
    def theirs(self, tmp_path):
        folder = tmp_path / "theirs"
        loop = run_in(folder, 5, ema_rate="0.9", save_interval=5)
        opt = loop.stepper.opt.state_dict()
        known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
        opt = {
            "state": {
                i: {**values, "step": int(values["step"])} for i, values in opt["state"].items()
            },
            "param_groups": [{name: opt["param_groups"][0][name] for name in known}],
        }
        th.save(opt, folder / "opt000005.pt", _use_new_zipfile_serialization=False)
        (folder / "state000005.pt").unlink()
        return folder

    def start(self, folder, path, capsys, **options) -> tuple[TrainLoop, str]:
        start = find_start(str(folder), str(path))
        logger.configure(str(folder), ["stdout", "csv"], resume_step=start.step)
        loop = new_loop(start=start, **options)
        return loop, capsys.readouterr().out

    def test_model_averages_and_optimizer(self, theirs, tmp_path, capsys):
        loop, said = self.start(
            tmp_path / "ours", theirs / "model000005.pt", capsys, ema_rate="0.9", max_steps=8
        )
        assert "model000005.pt at step 5" in said
        assert "from scratch" not in said
        loop.run_loop()
        logger.reset()
        whole = run_in(tmp_path / "whole", 8, ema_rate="0.9")
        # the same images, noise and AdamW: the same steps
        assert furthest(weights(loop), weights(whole)) == 0
        for ours, theirs_ in zip(loop.stepper.ema[0.9], whole.stepper.ema[0.9]):
            assert th.equal(ours, theirs_)
        assert rows(tmp_path / "ours")[0]["step"] == "6"

    def test_missing_parts_start_anew_and_it_says_so(self, theirs, tmp_path, capsys):
        (theirs / "opt000005.pt").unlink()
        loop, said = self.start(
            tmp_path / "ours", theirs / "model000005.pt", capsys, ema_rate="0.9,0.99"
        )
        logger.reset()
        assert "no averaged weights of rate 0.99 beside it: starting from its own" in said
        assert "opt000005.pt: AdamW starts from scratch" in said
        model = checkpoint.load(str(theirs / "model000005.pt"))
        average = checkpoint.load(str(theirs / "ema_0.9_000005.pt"))
        as_state = loop.stepper.weights_as_state_dict
        assert furthest(weights(loop), model) == 0
        assert furthest(as_state(loop.stepper.ema[0.99]), model) == 0
        assert furthest(as_state(loop.stepper.ema[0.9]), average) == 0

    def test_from_averaged_weights(self, theirs, tmp_path, capsys):
        loop, said = self.start(
            tmp_path / "ours", theirs / "ema_0.9_000005.pt", capsys, ema_rate="0.9"
        )
        logger.reset()
        assert "ema_0.9_000005.pt at step 5" in said
        assert "averaged weights: network and averages start from them, AdamW from scratch" in said
        average = checkpoint.load(str(theirs / "ema_0.9_000005.pt"))
        assert furthest(weights(loop), average) == 0
        assert furthest(loop.stepper.weights_as_state_dict(loop.stepper.ema[0.9]), average) == 0
        assert loop.stepper.opt.state_dict()["state"] == {}
        assert (loop.step, loop.stepper.steps) == (5, 5)

    def test_the_optimizer_of_a_float16_run(self, theirs, tmp_path, capsys):
        masters = [th.nn.Parameter(th.zeros(10)), th.nn.Parameter(th.zeros(1, 10))]
        th.save(th.optim.AdamW(masters).state_dict(), theirs / "opt000005.pt")
        with pytest.raises(UserError, match="float16 master weights of the original"):
            self.start(tmp_path / "ours", theirs / "model000005.pt", capsys)
        logger.reset()

    def test_a_published_model(self, theirs, tmp_path, capsys):
        path = tmp_path / "8x8_diffusion.pt"
        (theirs / "model000005.pt").rename(path)
        loop, said = self.start(tmp_path / "ours", path, capsys, max_steps=1)
        assert "AdamW starts from scratch" in said
        assert loop.step == 0
        loop.run_loop()
        logger.reset()
        assert "model000001.pt" in names(tmp_path / "ours")


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
