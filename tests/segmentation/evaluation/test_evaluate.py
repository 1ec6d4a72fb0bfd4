import csv
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from images_util import write_dicom
from paths import ROOT
from PIL import Image

from guided_diffusion.images.masks import write_mask
from guided_diffusion.preparation.phantoms import make_phantom
from guided_diffusion.segmentation.categories import ClassTable, generic_categories, load_categories
from guided_diffusion.segmentation.inference.uncertainty import entropy_map
from guided_diffusion.segmentation.prediction import Prediction

SCRIPT = ROOT / "scripts" / "evaluate.py"


@pytest.fixture
def run(script):
    """Run the script: (exit code, stdout, stderr)."""
    return functools.partial(script, "evaluate.py")


def write_set(folder, masks):
    for name, mask in masks.items():
        write_mask(f"{folder}/{name}.png", np.array(mask, np.uint8))
    return folder


@pytest.fixture
def small(tmp_path):
    """Two tiny pairs with four classes, of which the last is nowhere."""
    predicted = {"a": [[0, 1, 1], [2, 2, 0]], "b": [[0, 0], [2, 2]]}
    true = {"a": [[0, 1, 2], [2, 2, 1]], "b": [[0, 0], [2, 2]]}
    return write_set(tmp_path / "pred", predicted), write_set(tmp_path / "true", true)


def test_figures_by_hand(run, small, tmp_path):
    out = tmp_path / "out"
    code, screen, _ = run(*small, "--num-classes", 4, "--output", out)
    assert code == 0
    metrics = json.loads((out / "metrics.json").read_text())
    # a: [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 2, 0], 0]; b: 2 right background, 2 right of class 2
    assert metrics["confusion"] == [[3, 0, 0, 0], [1, 1, 0, 0], [0, 1, 4, 0], [0, 0, 0, 0]]
    per_class = metrics["per_class"]
    assert list(per_class) == ["background", "class 1", "class 2", "class 3"]
    assert per_class["class 2"]["dice"] == pytest.approx(8 / 9)
    assert per_class["class 2"]["iou"] == pytest.approx(4 / 5)
    assert per_class["class 2"]["true_pixels"] == 5
    assert per_class["class 2"]["predicted_pixels"] == 4
    assert per_class["class 1"] == {
        "dice": pytest.approx(1 / 2),
        "iou": pytest.approx(1 / 3),
        "true_pixels": 2,
        "predicted_pixels": 2,
        "images": 1,
    }
    assert per_class["class 3"]["dice"] is None
    assert per_class["class 3"]["iou"] is None
    assert metrics["mean_dice"] == pytest.approx((1 / 2 + 8 / 9) / 2)
    assert metrics["mean_iou"] == pytest.approx((1 / 3 + 4 / 5) / 2)
    assert metrics["mean_dice_with_background"] == pytest.approx((6 / 7 + 1 / 2 + 8 / 9) / 3)
    assert metrics["mean_iou_with_background"] == pytest.approx((3 / 4 + 1 / 3 + 4 / 5) / 3)
    over_images = metrics["mean_over_images"]
    assert over_images["mean_dice"] == pytest.approx(((1 / 2 + 4 / 5) / 2 + 1) / 2)
    assert over_images["per_class"]["class 1"]["dice"] == pytest.approx(1 / 2)
    assert over_images["per_class"]["class 2"]["iou"] == pytest.approx((2 / 3 + 1) / 2)
    assert over_images["per_class"]["class 3"]["iou"] is None
    assert metrics["images"] == 2
    assert metrics["pixels"] == 10

    with open(out / "per_image.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a", "b"}
    assert float(rows["a"]["dice_class 2"]) == pytest.approx(4 / 5)
    assert float(rows["a"]["mean_dice"]) == pytest.approx((1 / 2 + 4 / 5) / 2)
    assert rows["b"]["dice_class 1"] == rows["a"]["iou_class 3"] == "n/a"
    assert float(rows["b"]["mean_iou_with_background"]) == 1

    lines = {line.split("  ")[0]: line.split() for line in screen.split("\n\n")[0].split("\n")}
    assert lines["class 1"][2:4] == ["0.5000", "0.3333"]
    assert lines["class 3"][2:6] == ["n/a"] * 4
    assert lines["mean of the foreground"][4:6] == ["0.6944", "0.5667"]
    with Image.open(out / "confusion.png") as picture:
        assert picture.format == "PNG"


def test_results_are_replaced_and_said_so(run, small, tmp_path):
    out = tmp_path / "out"
    _, screen, _ = run(*small, "--output", out)
    assert screen.count("written: ") == 4
    (out / "metrics.json").write_text("old")
    _, screen, _ = run(*small, "--output", out)
    assert screen.count("replaced: ") == 4
    assert json.loads((out / "metrics.json").read_text())["images"] == 2
    written = {"metrics.json", "per_image.csv", "confusion.png", "report.html"}
    assert {p.name for p in out.iterdir()} == written


def test_classes_are_counted_where_nobody_tells(run, small, tmp_path):
    _, screen, said = run(*small)
    assert "3 classes, by the highest value in the masks" in said
    assert "class 2" in screen
    assert "class 3" not in screen
    table = tmp_path / "names.json"
    names = ["air", "left lung", "right lung"]
    table.write_text(
        json.dumps([{"index": i, "name": n, "color": [i, i, i]} for i, n in enumerate(names)])
    )
    _, screen, said = run(*small, "--categories", table)
    assert all(name in screen for name in names)
    assert "by the highest value" not in said


def test_binary_joins_classes_and_takes_black_and_white(run, small, tmp_path):
    _, truth = small
    black_white = write_set(
        tmp_path / "bw", {"a": [[0, 255, 255], [255, 255, 0]], "b": [[0, 0], [255, 255]]}
    )
    code, screen, _ = run(black_white, truth, "--binary", "--output", tmp_path / "out")
    assert code == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["confusion"] == [[3, 0], [1, 6]]
    assert metrics["mean_dice"] == pytest.approx(12 / 13)
    assert "foreground" in screen
    code, _, error = run(black_white, truth)
    assert code == 2
    assert "a.png holds the value 255" in error
    assert "--binary" in error


def test_surface_distances_in_pixels_and_millimetres(run, tmp_path):
    predicted, true = np.zeros((2, 20, 20), np.uint8)
    predicted[5:10, 7] = true[5:10, 3] = 1
    true[15, 15] = 2
    folders = write_set(tmp_path / "p", {"x": predicted}), write_set(tmp_path / "t", {"x": true})
    args = (*folders, "--surface", "--output", tmp_path / "out")
    run(*args)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["distances_px"]["per_class"] == {
        "class 1": {"hd95": 4, "asd": 4},
        "class 2": {"hd95": None, "asd": None},
    }
    assert metrics["distances_px"]["mean_hd95"] == 4
    assert "distances_mm" not in metrics
    _, screen, _ = run(*args, "--spacing", "0.5,0.25")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["distances_mm"]["per_class"]["class 1"] == {"hd95": 1, "asd": 1}
    assert metrics["distances_px"]["mean_asd"] == 4
    assert "HD95 px" in screen
    assert "ASD mm" in screen
    with open(tmp_path / "out/per_image.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["hd95_px_class 1"], row["asd_mm_class 2"]) == ("4.000000", "n/a")
    code, _, error = run(*folders, "--spacing", "0")
    assert code == 2
    assert "--spacing 0" in error


def test_millimetres_at_the_detector_are_named_so_and_never_averaged_with_others(run, tmp_path):
    predicted, true = np.zeros((2, 20, 20), np.uint8)
    predicted[5:10, 7] = true[5:10, 3] = 1
    names = ("detector", "magnified", "unknown")
    sets = {"p": predicted, "t": true}
    folders = [write_set(tmp_path / k, dict.fromkeys(names, m)) for k, m in sets.items()]
    (tmp_path / "films").mkdir()
    imager = {"ImagerPixelSpacing": [0.5, 0.5]}
    factor = {"EstimatedRadiographicMagnificationFactor": 2}
    for name, elements in zip(names, (imager, imager | factor, {})):
        write_dicom(tmp_path / "films", true, name=f"{name}.dcm", **elements)
    args = (*folders, "--images", tmp_path / "films", "--surface", "--output", tmp_path / "out")
    code, screen, _ = run(*args)
    assert code == 0
    assert "HD95 mm at the detector" in screen
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["distances_mm"]["mean_hd95"] == 1
    assert metrics["distances_mm_at_the_detector"]["mean_hd95"] == 2
    with open(tmp_path / "out/per_image.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    columns = ("hd95_px_class 1", "hd95_mm_class 1", "hd95_mm_at_the_detector_class 1")
    found = {name: [row[column] for column in columns] for name, row in rows.items()}
    assert found == {
        "detector": ["4.000000", "n/a", "2.000000"],
        "magnified": ["4.000000", "1.000000", "n/a"],
        "unknown": ["4.000000", "n/a", "n/a"],
    }
    page = (tmp_path / "out/report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["columns"][4:] == [
        "HD95 mm",
        "ASD mm",
        "HD95 mm at the detector",
        "ASD mm at the detector",
    ]
    shown = {card["name"]: card["classes"][0][1][4:] for card in data["cards"]}
    assert shown == {
        "detector": [None, None, 2, 2],
        "magnified": [1, 1, None, None],
        "unknown": [None] * 4,
    }
    code, screen, _ = run(*args, "--spacing", "0.1")
    assert "detector" not in screen


@pytest.fixture
def phantom_files(tmp_path):
    for seed in range(2):
        image, mask = make_phantom(seed, (40, 50))
        (tmp_path / "img").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"img/{seed}.png")
        write_mask(f"{tmp_path}/mask/{seed}.tif", mask)
    return tmp_path / "img", tmp_path / "mask"


class PhantomPredictor:
    """Knows the true mask of every phantom, and calls the caries background.

    :param sure: probability of what it says.
    """

    categories = load_categories()

    def __init__(self, sure=0.9):
        self.sure = sure

    def read(self, path):
        return np.full((40, 50), int(Path(path).stem), np.uint8)

    def start(self, images):
        return [lambda seed=int(image[0, 0]): self.predict(seed) for image in images]

    def predict(self, seed):
        mask = make_phantom(seed, (40, 50))[1]
        said = np.eye(7, dtype=np.float32)[np.where(mask == 5, 0, mask)].transpose(2, 0, 1)
        probabilities = said * (self.sure - (1 - self.sure) / 6) + np.float32((1 - self.sure) / 6)
        return Prediction(probabilities, entropy_map(probabilities))


@pytest.fixture
def perfect_model(monkeypatch):
    """Stands in for a checkpoint; the list of what was asked for."""
    asked = []

    def load_predictor(path, device=None, *options):
        asked.append((path, device))
        return PhantomPredictor()

    module = "guided_diffusion.segmentation.inference.predictor.load_predictor"
    monkeypatch.setattr(module, load_predictor)
    return asked


def test_a_model_is_evaluated_on_radiographs(run, phantom_files, perfect_model, tmp_path):
    code, screen, _ = run("--model", "segm.pth", *phantom_files, "--output", tmp_path / "out")
    assert code == 0
    assert [path for path, _ in perfect_model] == ["segm.pth"]
    per_class = json.loads((tmp_path / "out/metrics.json").read_text())["per_class"]
    assert per_class["pulp"]["dice"] == 1
    assert per_class["caries"]["dice"] == 0
    assert "dentine" in screen
    code, _, error = run("--model", "segm.pth", *phantom_files, "--num_classes", 3)
    assert code == 2
    assert "segm.pth predicts 7 classes, not 3" in error


def test_intervals_are_printed_and_kept(run, small, tmp_path):
    code, screen, _ = run(*small, "--output", tmp_path / "out")
    assert code == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    found = metrics["intervals"]
    # a alone, b alone, or both
    assert found["mean_over_images"]["mean_dice"] == pytest.approx([(1 / 2 + 4 / 5) / 2, 1])
    assert found["mean_dice"][0] <= metrics["mean_dice"] <= found["mean_dice"][1]
    assert (found["draws"], found["level"]) == (2000, 0.95)
    assert "95 % interval" in screen
    _, screen, _ = run(*small, "--bootstrap", 0, "--output", tmp_path / "out")
    assert "95 % interval" not in screen
    assert "intervals" not in json.loads((tmp_path / "out/metrics.json").read_text())


def test_a_models_calibration_is_measured(run, phantom_files, perfect_model, tmp_path):
    argv = ("--model", "segm.pth", *phantom_files, "--output", tmp_path / "out")
    code, screen, _ = run(*argv)
    assert code == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())["calibration"]
    masks = [make_phantom(seed, (40, 50))[1] for seed in range(2)]
    accuracy = 1 - np.mean([mask == 5 for mask in masks])
    assert found["expected_calibration_error"] == pytest.approx(accuracy - 0.9, abs=1e-5)
    assert f"expected calibration error {accuracy - 0.9:.4f}" in screen
    assert len(found["uncertainty_deciles"]) == 10
    for name in ("reliability.png", "uncertainty_deciles.png"):
        Image.open(tmp_path / "out" / name).load()
    assert run(*argv, "--binary")[0] == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(found["per_class"]) == ["background", "foreground"]
    assert found["calibration"]["expected_calibration_error"] > 0


def test_a_radiograph_of_another_size_than_its_mask_is_named(run, phantom_files, perfect_model):
    write_mask(f"{phantom_files[1]}/1.tif", np.zeros((3, 4), np.uint8))
    code, _, error = run("--model", "segm.pth", *phantom_files)
    assert code == 2
    assert "1.png is 40x50 and" in error


def test_radiographs_in_place_of_masks_are_told_from_them(run, phantom_files):
    images, masks = phantom_files
    for argv, which, remedy in (
        ((images, masks), "img/0.png", "with --model"),
        ((images, masks, "--num_classes", 7), "img/0.png", "with --model"),
        ((images, masks, "--binary", True), "img/0.png", "with --model"),
        ((masks, "--compare", images, masks), "img/0.png", "with --model"),
        ((masks, images), "img/0.png", "as the last argument"),
    ):
        code, _, error = run(*argv)
        assert code == 2
        assert f"{which} looks like a radiograph" in error
        assert remedy in error
        assert "black-and-white" not in error
    with Image.open(images / "0.png") as picture:
        picture.save(images / "0.jpg", quality=80)
    (images / "0.png").unlink()
    code, _, error = run(images, masks)
    assert code == 2
    assert "If it is a radiograph, name the model" in error


def test_a_folder_is_compared_with_itself(run, small):
    code, _, said = run(small[1], f"{small[1]}/../{small[1].name}", "--num-classes", 4)
    assert code == 0
    assert "compared with itself" in said


def test_two_sets_of_masks_are_compared(run, tmp_path):
    rng = np.random.default_rng(0)
    true = {str(n): rng.integers(0, 3, (12, 12)) for n in range(8)}
    sets = {"true": true}
    for name, share in (("bad", 0.5), ("good", 0.1)):
        sets[name] = {
            n: np.where(rng.random((12, 12)) < share, (mask + 1) % 3, mask)
            for n, mask in true.items()
        }
    truth, bad, good = (write_set(tmp_path / name, sets[name]) for name in ("true", "bad", "good"))
    code, screen, _ = run(truth, "--compare", bad, good, "--output", tmp_path / "out")
    assert code == 0
    assert "B is better by" in screen
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"comparison.json", "comparison.csv"}
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    mean = found["differences"]["mean"]
    assert (found["first"], found["second"]) == (str(bad), str(good))
    assert mean["p_permutation"] == pytest.approx(2 / 2**8)  # all images agree
    assert mean["p_wilcoxon"] == pytest.approx(2 / 2**8)
    assert mean["interval"][0] > 0
    alone = json.loads(_metrics(run, good, truth, tmp_path))["mean_over_images"]["mean_dice"]
    assert mean["second"] == pytest.approx(alone)
    with open(tmp_path / "out/comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert np.mean([float(row["B_mean_dice"]) for row in rows]) == pytest.approx(alone, abs=1e-5)
    _, screen, _ = run(truth, "--compare", good, good)
    assert "no difference shown on 8 images" in screen


def _metrics(run, predicted, truth, folder):
    assert run(predicted, truth, "--output", folder / "alone")[0] == 0
    return (folder / "alone/metrics.json").read_text()


def test_a_model_is_compared_with_masks(run, phantom_files, perfect_model, tmp_path):
    perfect = write_set(
        tmp_path / "perfect", {str(n): make_phantom(n, (40, 50))[1] for n in range(2)}
    )
    argv = (*phantom_files, "--compare", "one.pth", perfect)
    code, screen, _ = run(*argv)
    assert code == 0
    assert "2 images are too few to tell" in screen
    assert "B - A = +0.1667, 95 % interval" in screen
    assert "better" not in screen
    assert "caries" in screen
    code, _, error = run(phantom_files[1], "--compare", "one.pth", "two.pth")
    assert (code, "IMAGES TRUE_MASKS" in error) == (2, True)


def test_models_of_other_classes_are_not_compared(run, phantom_files, monkeypatch):
    def load_predictor(path, *options):
        predictor = PhantomPredictor()
        if path == "two.pth":
            table = [*predictor.categories]
            names = ["background", "bone", "enamel", *(c.name for c in table[3:])]
            predictor.categories = ClassTable(
                dataclasses.replace(category, name=name) for category, name in zip(table, names)
            )
        return predictor

    module = "guided_diffusion.segmentation.inference.predictor.load_predictor"
    monkeypatch.setattr(module, load_predictor)
    code, _, error = run(*phantom_files, "--compare", "one.pth", "two.pth")
    assert code == 2
    assert "class 1 is 'enamel' in one.pth and 'bone' in two.pth: only predictions" in error
    assert run(*phantom_files, "--compare", "one.pth", "one.pth")[0] == 0


def test_a_models_names_stay_unless_a_file_replaces_them(
    run, phantom_files, perfect_model, tmp_path
):
    _, screen, _ = run("-m", "segm.pth", *phantom_files, "--num_classes", 7)
    assert "dentine" in screen
    table = tmp_path / "other.json"
    plain = [
        {"index": c.index, "name": f"new {c.index}", "color": c.color}
        for c in generic_categories(7)
    ]
    table.write_text(json.dumps(plain))
    _, screen, _ = run("-m", "segm.pth", *phantom_files, "--categories", table)
    assert "new 3" in screen
    assert "dentine" not in screen


def test_files_and_result_folders(run, small, tmp_path):
    predicted, true = small
    code, screen, _ = run(predicted / "a.png", true / "a.png")
    assert code == 0
    assert "0.6500" in screen  # (1/2 + 4/5) / 2
    results = tmp_path / "results"
    write_set(results / "MASK", {"a": [[0, 1, 1], [2, 2, 0]], "b": [[0, 0], [2, 2]]})
    write_set(results / "OVERLAY", {"a": [[9]], "b": [[9]]})
    assert run(results, true)[0] == 0


def test_faults_end_with_one_line(run, small, tmp_path):
    predicted, true = small

    def fault(*args):
        code, _, error = run(*args)
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    assert "nowhere does not exist" in fault(predicted, tmp_path / "nowhere")
    assert "two folders or two files" in fault(predicted, true / "a.png")
    assert "TRUE_MASKS" in fault(predicted)
    assert "a.png" in fault(predicted, true, "--num_classes", 2)
    assert "2" in fault(predicted, true, "--num_classes", 2)
    assert "a.png: a file is in the way of a folder" in fault(
        predicted, true, "--output", true / "a.png"
    )
    write_mask(f"{true}/c.png", np.zeros((2, 2), np.uint8))
    assert "c.png" in fault(predicted, true)
    (true / "c.png").unlink()
    write_mask(f"{true}/b.png", np.zeros((2, 3), np.uint8))
    error = fault(predicted, true)
    assert "pred/b.png is 2x2" in error
    assert "true/b.png 2x3" in error


def test_the_script_runs_by_itself_from_anywhere(small, tmp_path):
    command = [sys.executable, str(SCRIPT), *map(str, small)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "mean of the foreground" in done.stdout
