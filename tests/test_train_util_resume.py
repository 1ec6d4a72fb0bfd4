"""guided_diffusion.train_util: finding checkpoints and resuming from them, in one process."""

import csv
import dataclasses

import pytest
import torch as th
from loop_util import (
    DIFFUSION,
    TINY,
    files,
    furthest,
    interrupted,
    logged_losses,
    names,
    new_loop,
    rows,
    run_in,
    weights,
)

from guided_diffusion import logger
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.runtime.storage.resume import Start
from guided_diffusion.train_util import (
    TrainLoop,
    find_ema_checkpoint,
    find_resume_checkpoint,
    find_start,
    parse_resume_step_from_filename,
)


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
        # in its own folder the run is further on: its command was rerun
        assert find_start(str(folder), path).step == 4
        with pytest.raises(UserError, match=r"model000009\.pt: there is no such file"):
            find_start(other, str(folder / "model000009.pt"))

    def test_models_of_the_original_are_not_written_over(self, tmp_path):
        th.save(TINY.build().state_dict(), tmp_path / "model000010.pt")
        with pytest.raises(UserError, match=r"start from it with --resume_checkpoint .*000010\.pt"):
            find_start(str(tmp_path), "auto")
        assert find_start(str(tmp_path), str(tmp_path / "model000010.pt")).step == 10


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

    def test_a_changed_seed_is_logged(self, tmp_path, capsys):
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


# minutes that have passed at every step
OFTEN = {"save_minutes": 1e-9, "save_interval": 4}


class TestSavingByTheClock:
    """`save_minutes`: checkpoints that the next one replaces."""

    def test_the_next_checkpoint_replaces_it(self, tmp_path, monkeypatch):
        seen = []
        save = TrainLoop.save

        def save_and_look(loop, passing=False):
            save(loop, passing)
            seen.append((loop.step, passing, checkpoint.complete_steps(loop.folder)))

        monkeypatch.setattr(TrainLoop, "save", save_and_look)
        often = run_in(tmp_path / "often", 7, **OFTEN)
        assert seen == [
            (2, True, [2]),
            (3, True, [3]),
            (4, False, [4]),
            (5, True, [4, 5]),
            (6, True, [4, 6]),
            (7, False, [4, 7]),
        ]
        seen.clear()
        monkeypatch.setattr(TrainLoop, "save", save)
        seldom = run_in(tmp_path / "seldom", 7, save_interval=4, save_minutes=0)
        assert furthest(weights(often), weights(seldom)) == 0
        assert logged_losses(tmp_path / "often") == logged_losses(tmp_path / "seldom")
        assert checkpoint.complete_steps(str(tmp_path / "seldom")) == [4, 7]

    def test_a_killed_run_goes_on_from_it_exactly(self, tmp_path):
        whole = run_in(tmp_path / "whole", 9, save_interval=4)
        path = tmp_path / "killed"
        with pytest.raises(KeyboardInterrupt):
            run_in(path, 9, **OFTEN, data=interrupted(7))
        assert find_start(str(path)).step == 7
        left = run_in(path, 9, save_interval=4)
        assert furthest(weights(left), weights(whole)) == 0
        assert logged_losses(path) == logged_losses(tmp_path / "whole")
        # the run that goes on replaces it too
        assert checkpoint.complete_steps(str(path)) == [4, 8, 9]

    def test_it_is_removed_though_the_run_was_killed_between(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "remove_step", lambda folder, step: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_in(tmp_path, 9, **OFTEN)
        assert checkpoint.complete_steps(str(tmp_path)) == [2, 3]
        run_in(tmp_path, 5, save_interval=4)
        assert checkpoint.complete_steps(str(tmp_path)) == [4, 5]

    def test_another_folders_steps_are_not_removed(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path / "old", 9, **OFTEN, data=interrupted(3))
        start = find_start(str(tmp_path / "new"), str(tmp_path / "old/model000003.pt"))
        assert start.state["passing"] == [2, 3]
        loop = new_loop(start=start, folder=str(tmp_path / "new"), max_steps=4)
        loop.step = 2
        loop.save()
        loop.run_loop()
        assert checkpoint.complete_steps(str(tmp_path / "new")) == [2, 4]

    def test_few_are_kept(self, tmp_path):
        run_in(tmp_path, 9, **OFTEN, keep_checkpoints=2)
        assert checkpoint.complete_steps(str(tmp_path)) == [8, 9]

    def test_the_clock_of_the_first_rank_counts(self, tmp_path, monkeypatch):
        loop = new_loop(folder=str(tmp_path), **OFTEN)
        assert loop._save_due()
        monkeypatch.setattr("guided_diffusion.dist_util.is_main", lambda: False)
        assert not loop._save_due()
