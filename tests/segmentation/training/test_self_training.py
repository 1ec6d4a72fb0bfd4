"""Self-training: teachers, pseudo-labels, a student."""

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import digests, draw_pairs
from finetuning_util import folders, same, weights

from guided_diffusion.runtime.signals import EXIT_STOPPED
from guided_diffusion.segmentation.inference.uncertainty import entropy_map
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.segmentation.prediction import Prediction
from guided_diffusion.segmentation.training import loop, pseudo_labels, self_training
from guided_diffusion.segmentation.training.learning import LearningConfig
from guided_diffusion.segmentation.training.pseudo_labels import (
    PseudoLabels,
    draw_radiographs,
    uncertainty_of,
)

STAGES = "segm_logs/stages"


@pytest.fixture
def unlabelled(tmp_path):
    draw_pairs(tmp_path / "more", 5, seed=7)
    return tmp_path / "more" / "IMG"


class TestDraw:
    paths = tuple(f"set/patient{n // 4}_{n}.png" for n in range(12))
    hashes = tuple(f"{n * 7919 % 1000:03}" for n in range(12))

    def drawn(self, count, seed=0, order=range(12)):
        paths, hashes = ([part[n] for n in order] for part in (self.paths, self.hashes))
        return [hashes[n] for n in draw_radiographs(paths, hashes, count, seed)]

    def test_patients_come_in_turn(self):
        for seed in range(4):
            numbers = [self.hashes.index(found) for found in self.drawn(0, seed)]
            assert sorted(numbers) == list(range(12))
            for first in (0, 3, 6, 9):
                assert {n // 4 for n in numbers[first : first + 3]} == {0, 1, 2}

    def test_fewer_are_the_first_of_more_and_the_seed_counts(self):
        assert self.drawn(5) == self.drawn(9)[:5]
        assert self.drawn(5) != self.drawn(5, seed=1)

    def test_neither_the_order_of_the_files_counts_nor_copies(self):
        assert self.drawn(5, order=range(11, -1, -1)) == self.drawn(5)
        assert self.drawn(0, order=[*range(12), 3, 3]) == self.drawn(0)


def prediction(*foreground: float) -> Prediction:
    """Of two classes, in a row of pixels."""
    row = np.array([foreground], np.float32)
    probabilities = np.stack([1 - row, row])
    return Prediction(probabilities, entropy_map(probabilities))


class TestUncertainty:
    def test_is_that_of_the_foreground(self):
        sure, unsure = prediction(0, 0, 1, 1), prediction(0, 0.5, 1, 1)
        assert uncertainty_of(sure) == 0
        assert uncertainty_of(unsure) == pytest.approx(1 / 2.5)
        assert uncertainty_of(prediction(*[0] * 50, 0, 0.5, 1, 1)) == uncertainty_of(unsure)

    def test_is_highest_where_nothing_is_found(self):
        assert uncertainty_of(prediction(0, 0, 0)) == float("inf")

    def test_the_least_certain_are_dropped(self):
        masks = [np.full((2, 2), n, np.uint8) for n in range(4)]
        labels = PseudoLabels("", list("abcd"), masks, masks, [0.3, 0.9, 0.1, float("inf")])
        assert labels.most_certain(0.5) == [0, 2]
        assert labels.most_certain(0.99) == [2]
        assert labels.pairs(0.25, None).names == ("a", "b", "c")


def test_labels_survive_their_file(tmp_path):
    path = str(tmp_path / "labels.pt")
    assert PseudoLabels.load(path) is None
    images = [np.arange(n, dtype=np.uint8).reshape(1, n, 1) for n in (3, 5)]
    masks = [image[..., 0] for image in images]
    PseudoLabels(path, ["a", "b", "c"], images, masks, [0.5, 2.0]).save()
    found = PseudoLabels.load(path)
    assert found is not None
    assert not found.complete
    assert (found.drawn, found.uncertainties) == (["a", "b", "c"], [0.5, 2.0])
    assert all(map(np.array_equal, found.images + found.masks, images + masks))


def test_an_epoch_of_the_student_sees_every_labelled_image():
    settings = LearningConfig(epochs=2, unlabeled_dir="some", synthetic_weight=0.75)
    assert settings.length(6) == (2, 12, 24)
    assert LearningConfig(epochs=2, unlabeled_dir="some", student_steps=9).length(3) == (3, 3, 9)
    assert LearningConfig(steps=300, unlabeled_dir="some").length(5).steps == 600


@pytest.fixture
def argv(pretrained, split, unlabelled):
    """Flags of a run that takes seconds."""
    return [
        *(pretrained, *folders(split), "--steps", 4, "--lr", 1e-3, "--out_channels", 3),
        *("--unlabeled_dir", unlabelled, "--teachers", 2, "--unlabeled_images", 4),
        *("--confidence", 0.35, "--drop_uncertain", 0.5),
    ]


def test_a_run_goes_through_its_stages(script, argv, tmp_path):
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    for stage in ("1/4 teacher 1", "2/4 teacher 2", "3/4 labels", "4/4 student"):
        assert stage in ended.err
    assert "5 unlabelled images" in ended.err
    assert "2 pseudo-labelled images" in ended.err
    stages = tmp_path / STAGES
    kept = {"origin.pt", "teacher_1.pth", "teacher_2.pth", "labels_1.pt", "labels_1.csv"}
    assert {p.name for p in stages.iterdir()} == kept | {"teacher_1_logs", "teacher_2_logs"}
    rows = list(csv.DictReader((stages / "labels_1.csv").open()))
    assert [row["learnt_from"] for row in rows] == ["0", "0", "1", "1"]
    assert not same(weights(stages / "teacher_1.pth"), weights(stages / "teacher_2.pth"))
    # the student learnt from more than the masks; the first teacher from them alone
    alone = script("finetune.py", *argv[:11], "--weights_save", "alone.pth")
    assert alone.code == 0, alone.err
    assert same(weights("alone.pth"), weights(stages / "teacher_1.pth"))
    assert not same(weights("alone.pth"), weights("segm.pth"))
    before = digests(tmp_path)
    again = script("finetune.py", *argv)
    assert (again.code, again.out.strip()) == (0, "this run is complete: nothing to do"), again.err
    assert digests(tmp_path) == before


@pytest.mark.parametrize("moment", ["teacher", "teacher's end", "labels", "student"])
def test_a_stopped_run_goes_on_exactly(script, argv, tmp_path, monkeypatch, moment):
    assert script("finetune.py", *argv, "--rounds", 2, "--weights_save", "whole/segm.pth").code == 0
    argv += ["--rounds", 2, "--weights_save", "parts/segm.pth"]
    train, measure, count = loop.Finetuner._train_epoch, pseudo_labels.uncertainty_of, [0]

    def stop_training(self, batches):
        train(self, batches)
        epoch = self.length.epochs - 1 if "end" in moment else 0
        if self.epoch == epoch and (self.data.pseudo is not None) == (moment == "student"):
            count[0] += 1
            if count[0] == 2:
                signal.raise_signal(signal.SIGTERM)

    def stop_labelling(prediction):
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGTERM)
        return measure(prediction)

    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "_BATCH", 1)
        if moment == "labels":
            patch.setattr(pseudo_labels, "uncertainty_of", stop_labelling)
        else:
            patch.setattr(loop.Finetuner, "_train_epoch", stop_training)
        ended = script("finetune.py", *argv)
        assert ended.code == EXIT_STOPPED, ended.err
        assert count[0] >= 2
    # renaming files meanwhile changes nothing
    for path in sorted((tmp_path / "more" / "IMG").iterdir()):
        path.rename(path.with_name(f"z{9 - int(path.stem[1])}.png"))
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    assert same(weights("whole/segm.pth"), weights("parts/segm.pth"))
    labels = [PseudoLabels.load(f"{f}/{STAGES}/labels_2.pt") for f in ("whole", "parts")]
    assert labels[0] is not None
    assert labels[1] is not None
    assert labels[0].uncertainties == pytest.approx(labels[1].uncertainties)
    assert all(map(np.array_equal, labels[0].masks, labels[1].masks))


def test_stages_of_another_command_are_refused(script, argv, tmp_path, monkeypatch):
    def stop(stage):
        return "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(self_training.SelfTraining, "stages", lambda self: [("none", stop)])
        assert script("finetune.py", *argv).code == EXIT_STOPPED
    before = digests(tmp_path)
    ended = script("finetune.py", *argv, "--confidence", 0.5)
    assert ended.code == 2
    assert "confidence 0.5 instead of 0.35" in ended.err
    assert digests(tmp_path) == before
    draw_pairs(tmp_path / "more", 6, seed=7)
    assert "unlabeled_dir: r5.png new" in script("finetune.py", *argv).err
    assert script("finetune.py", *argv, "--resume_checkpoint", "none").code == 0
    assert (tmp_path / "segm_logs.old").exists()


def test_other_models_teach(script, argv, split, tmp_path):
    smp = ["baseline_train.py", *folders(split), "--network", "smp", "--image_size", 32]
    pytest.importorskip("segmentation_models_pytorch")
    ended = script(*smp, "--epochs", 1, "--out_channels", 3, "--weights_save", "smp.pth")
    assert ended.code == 0, ended.err
    argv += ["--teachers", 0, "--teacher_models", "smp.pth,smp.pth"]
    ended = script("finetune.py", *argv)
    assert ended.code == 0, ended.err
    assert "1/2 labels" in ended.err
    assert load_model("segm.pth")[1].kind == "unet"
    with open("smp.pth", "rb") as file:
        content = file.read()
    th.save(th.load("smp.pth", weights_only=True) | {"more": 1}, "smp.pth")
    assert "teacher_models: smp.pth changed" in script("finetune.py", *argv).err
    with open("smp.pth", "wb") as file:
        file.write(content)
    assert "complete" in script("finetune.py", *argv).out


def test_baselines_teach_themselves(script, split, unlabelled):
    ended = script(
        *("baseline_train.py", *folders(split)[:2], "--network", "unet", "--image_size", 16),
        *("--num_channels", 32, "--channel_mult", "1,2", "--num_res_blocks", 1, "--steps", 2),
        *("--unlabeled_dir", unlabelled, "--teachers", 1, "--confidence", 0.3),
    )
    assert ended.code == 0, ended.err
    assert "3/3 student" in ended.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--teachers", 0), "--teacher_models"),
        (("--synthetic_dir", "more"), "leave out either"),
        (("--teacher_models", "absent.pth"), "absent.pth"),
    ],
)
def test_mistakes_are_found_before_the_first_step(script, argv, tmp_path, flags, said):
    ended = script("finetune.py", *argv, *flags)
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "segm_logs").exists()


def test_teachers_of_other_classes_are_refused(script, argv, pretrained, split, tmp_path):
    made = script(
        *("finetune.py", pretrained, *folders(split)[:2], "--out_channels", 4, "--steps", 1),
        *("--weights_save", "four.pth"),
    )
    assert made.code == 0, made.err
    ended = script("finetune.py", *argv, "--teacher_models", "four.pth")
    assert ended.code == 2
    assert "four.pth 4" in ended.err


def test_labels_without_foreground_are_of_no_use(script, argv):
    for _ in range(2):
        ended = script("finetune.py", *argv, "--confidence", 1)
        assert ended.code == 2
        assert "--confidence 1.0" in ended.err


def test_a_comparison_runs_it_and_leaves_no_teachers(script, pretrained, split, unlabelled):
    flags = f"--unlabeled_dir {unlabelled} --teachers 1 --confidence 0.3"
    ended = script(
        *("label_efficiency.py", *folders(split), "--checkpoint", pretrained, "--k", 2),
        *("--seeds", 0, "--steps", 2, "--jobs", 1, "--method", f"self: {flags}"),
        *("--methods", "self", "-o", "out"),
    )
    assert ended.code == 0, ended.err
    assert "| self" in ended.out
    assert not list(Path("out").rglob("*.pth"))
