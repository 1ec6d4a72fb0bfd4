"""Playing the loop of predicting, correcting and learning again."""

import csv
import json
import pickle
import shutil

import pytest
from conftest import digests, draw_pairs

from guided_diffusion.segmentation.evaluation import efficiency_work
from guided_diffusion.segmentation.evaluation.config import LoopConfig
from guided_diffusion.segmentation.evaluation.draws import draw
from guided_diffusion.segmentation.evaluation.loop_plan import LoopPlan
from guided_diffusion.segmentation.evaluation.loop_tables import LoopTable

NAMES = [f"r{number}" for number in range(8)]


def rows(name):
    with open(name) as file:
        return list(csv.DictReader(file))


def images(folder, run):
    return json.loads((folder / "runs" / run / "result.json").read_text())["images"]


@pytest.fixture
def play(script, pretrained, tmp_path):
    """Runs the script on eight images to choose among and two to evaluate on."""
    draw_pairs(tmp_path / "TRAIN", len(NAMES))
    draw_pairs(tmp_path / "VAL", 2, seed=1)
    folders = [str(tmp_path / part / kind) for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK")]

    def run(*flags, out="out"):
        own = ("--checkpoint", pretrained, "--start", 2, "--add", 2, "--rounds", 2)
        more = ("--seeds", "0", "--steps", 2, "--common", "--augmentation none", "-j", 1, "-o", out)
        return script("simulate_loop.py", *folders, *own, *more, *flags)

    return run


def test_images_are_added_by_each_rule(play, tmp_path):
    ended = play("--choose", "next,uncertain,random")
    assert ended.code == 0, ended.err
    assert "| next | " in ended.out
    out = tmp_path / "out"
    start = draw(NAMES, 2, 0)
    for rule in ("next", "uncertain", "random"):
        first, second, third = (images(out, f"{rule}_k{k}_seed0") for k in (2, 4, 6))
        assert first == start
        assert (second[:2], third[:4]) == (first, second)
        assert [len(set(names)) for names in (second, third)] == [4, 6]
    assert images(out, "random_k6_seed0") == draw(NAMES, 6, 0)
    chosen = json.loads((out / "runs/next_k4_seed0/chosen.json").read_text())
    assert chosen == {"images": images(out, "next_k4_seed0")[2:]}
    table = rows(out / "table.csv")
    assert [(row["method"], row["k"]) for row in table] == [
        (rule, k) for rule in ("next", "uncertain", "random") for k in "246"
    ]
    by_rule = {(row["method"], row["k"]): row["mean_dice mean"] for row in table}
    assert len({row["mean_dice mean"] for row in table if row["k"] == "2"}) == 1
    by_round = rows(out / "rounds.csv")
    keys = [tuple(row[name] for name in ("seed", "round", "labelled")) for row in by_round]
    assert keys == [("0", "0", "2"), ("0", "1", "4"), ("0", "2", "6")]
    for row in by_round:
        for rule in ("uncertain", "random"):
            scores = (by_rule[rule, row["labelled"]] for rule in ("next", rule))
            first, other = map(float, scores)
            assert float(row["next"]) == pytest.approx(first, abs=1e-5)
            assert float(row[f"next - {rule}"]) == pytest.approx(first - other, abs=1e-5)
    assert "| 0 | 2 | 6 | " in ended.out
    assert "next minus random, the mean over rounds 1 to 2: " in ended.out
    assert (out / "curves.png").is_file()
    assert not list(out.rglob("segm*.pth"))


def test_it_resumes(play, tmp_path, monkeypatch):
    only = ("--choose", "next")
    assert play(*only, out="whole").code == 0
    train, left = efficiency_work._train, [2]

    def stops(plan, run):
        left[0] -= 1
        return "SIGTERM" if left[0] < 0 else train(plan, run)

    monkeypatch.setattr(efficiency_work, "_train", stops)
    ended = play(*only)
    assert ended.code == 75
    assert [row["labelled"] for row in rows(tmp_path / "out/rounds.csv")] == ["2", "4"]
    assert "rerun the command to resume" in ended.err
    left[0] = 1  # but no more: what is finished is not trained again
    assert play(*only).code == 0
    assert images(tmp_path / "out", "next_k6_seed0") == images(tmp_path / "whole", "next_k6_seed0")
    scores = [[r["mean_dice"] for r in rows(tmp_path / n / "runs.csv")] for n in ("out", "whole")]
    assert scores[0] == scores[1]
    before = digests(tmp_path / "out" / "runs")
    assert play(*only).code == 0
    assert digests(tmp_path / "out" / "runs") == before
    ended = play(*only, "--steps", 3)
    assert ended.code == 2
    assert "was made with other flags or data" in ended.err


def test_a_lost_network_is_trained_again(play, tmp_path):
    only = ("--choose", "next", "--rounds", 1)
    assert play(*only).code == 0
    before = images(tmp_path / "out", "next_k4_seed0")
    shutil.rmtree(tmp_path / "out/runs/next_k4_seed0")
    ended = play(*only)
    assert ended.code == 0, ended.err
    assert images(tmp_path / "out", "next_k4_seed0") == before


def run_of(rule, k, seed, dice):
    return {"method": rule, "k": k, "seed": seed, "mean_dice": dice}


class TestVerdict:
    """Over all rounds, of each seed the mean."""

    def table(self, advantages):
        """Of two rounds, in the first of which `next` is ahead by 0.3 more."""
        runs = []
        for seed, ahead in enumerate(advantages):
            runs += [run_of(rule, 2, seed, 0.3) for rule in ("next", "random")]
            runs += [run_of("random", k, seed, 0.4 + k / 100) for k in (4, 6)]
            runs += [run_of("next", 4, seed, 0.74 + ahead), run_of("next", 6, seed, 0.16 + ahead)]
        return LoopTable(runs, ["next", "random"], [2, 4, 6], range(len(advantages)))

    @pytest.mark.parametrize(
        ("advantages", "says"),
        [
            ([0.02] * 6, "+0.020 ± 0.000 (standard error, n = 6 seeds), above 0 in 6 of them, p ="),
            ([0.02] * 6, "p = 0.031 by permutation."),
            ([0.02] * 5, "n = 5 seeds), above 0 in 5 of them, p = 0.062 by permutation: not est"),
            ([-0.02, 0.03] * 4, "above 0 in 4 of them, p = 0.7 by permutation: not established"),
            ([0.02], "+0.020 (standard error, n = 1 seeds)"),
        ],
    )
    def test_chance_is_named(self, advantages, says):
        assert says in self.table(advantages).markdown()

    def test_seeds_that_have_not_finished_do_not_count(self):
        table = LoopTable([run_of("next", 2, 0, 0.5)], ["next", "random"], [2, 4], [0, 1])
        assert "| 0 | 0 | 2 | 0.5000 | n/a |  |" in table.markdown()
        assert "no seed has finished its rounds" in table.markdown()
        assert "minus" not in LoopTable([], ["next"], [2, 4], [0]).markdown()


@pytest.fixture
def plan(tmp_path, pretrained):
    """Of eight images of four patients."""
    draw_pairs(tmp_path / "TRAIN", 8)
    draw_pairs(tmp_path / "VAL", 1, seed=1)
    for path in sorted((tmp_path / "TRAIN").rglob("*.png")):
        number = int(path.stem[1:])
        path.rename(path.with_name(f"P{number // 2:03d}-{number % 2}.png"))
    folders = [tuple(str(tmp_path / p / k) for k in ("IMG", "MASK")) for p in ("TRAIN", "VAL")]
    config = LoopConfig(str(pretrained), start=2, add=1, rounds=2, output=str(tmp_path / "out"))
    return LoopPlan(config, *folders)


def test_a_patient_is_labelled_once(plan):
    drawn = [run for run in plan.runs if run.method.name == "random"]
    for run in drawn:
        assert len({name[:4] for name in plan.images_of(run)}) == run.k
    assert len(drawn) == 9


def test_processes_wait_for_runs_that_others_have_begun(plan):
    """They take runs in order, so no run may wait for a later one."""
    copy = pickle.loads(pickle.dumps(plan))
    for number, run in enumerate(copy.runs):
        waits_for = copy.start(run) if copy.repeats_start(run) else copy.previous(run)
        assert waits_for is None or waits_for in copy.runs[:number]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--choose", "best"), "--choose best: name some of next, uncertain, random"),
        (("--method", "partner"), "--method partner: name one that trains a single network"),
        (("--rounds", 4), "make 10 images; "),
        (("--common", "--lr nonsense"), "--lr"),
        (("--start", 0), "--start 0"),
    ],
)
def test_wrong_flags(play, tmp_path, flags, said):
    ended = play(*flags)
    assert ended.code == 2
    assert said in ended.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
