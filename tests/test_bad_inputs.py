"""What users get wrong: one line that says what, where and what to do; exit code 2; nothing
overwritten."""

import shutil

import numpy as np
import pytest
import torch as th
from conftest import draw_pairs
from PIL import Image


def refused(ended, *parts: str) -> None:
    assert ended.code == 2, (ended.code, ended.out, ended.err)
    lines = ended.err.strip().split("\n")
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


def tuning(split, checkpoint):
    dirs = [split / part / kind for part in ("TRAIN", "VAL") for kind in ("IMG", "MASK")]
    return ["finetune.py", checkpoint, *dirs, "--epochs", 1]


class TestTraining:
    def flags(self, data) -> list:
        words = "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2"
        words += " --num_heads 1 --attention_resolutions 8 --max_steps 1 --sample_interval 0"
        return ["image_train.py", "--data_dir", data, *words.split()]

    def test_no_data_dir(self, script):
        refused(script("image_train.py"), "--data_dir")

    def test_missing_folder(self, script):
        refused(script(*self.flags("nowhere")), "nowhere")

    def test_no_images_in_the_folder(self, script, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "notes.txt").write_text("hello")
        refused(script(*self.flags("data")), "data", "txt", "png")
        assert not (tmp_path / "runs").exists()

    def test_fewer_images_than_the_batch(self, script, tmp_path):
        draw_pairs(tmp_path, 3)
        refused(script(*self.flags("IMG"), "--batch_size", 4), "3 images", "4", "--batch_size")
        assert not (tmp_path / "runs").exists()

    def test_a_text_file_named_png(self, script, tmp_path):
        draw_pairs(tmp_path, 2)
        (tmp_path / "IMG" / "broken.png").write_text("this is no picture")
        refused(script(*self.flags("IMG"), "--batch_size", 3), "broken.png")
        assert not (tmp_path / "runs").exists()

    def test_a_size_that_the_depth_does_not_divide(self, script, tmp_path):
        draw_pairs(tmp_path, 2)
        refused(script(*self.flags("IMG"), "--image_size", 17), "17", "16 or 18")

    def test_flags_that_contradict_the_run_in_the_folder(self, script, tmp_path, monkeypatch):
        draw_pairs(tmp_path, 2)
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
        assert script(*self.flags("IMG")).code == 0
        before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").glob("*.pt"))
        refused(script(*self.flags("IMG"), "--num_channels", 64), "--num_channels 64", "32")
        refused(script(*self.flags("IMG"), "--resume_checkpoint", "none"), "--output")
        after = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").glob("*.pt"))
        assert after == before

    def test_a_missing_checkpoint(self, script, tmp_path):
        draw_pairs(tmp_path, 2)
        refused(script(*self.flags("IMG"), "--resume_checkpoint", "gone.pt"), "gone.pt")

    def test_an_unknown_flag(self, script):
        refused(script("image_train.py", "--learning", 1), "--learning")


class TestFinetuning:
    def test_names_that_do_not_pair_are_listed(self, script, pretrained, split, tmp_path):
        (split / "TRAIN" / "IMG" / "r1.png").rename(split / "TRAIN" / "IMG" / "other.png")
        refused(script(*tuning(split, pretrained)), "other", "r1")
        assert not (tmp_path / "segm_logs").exists()

    def test_mask_of_another_size(self, script, pretrained, split):
        path = split / "VAL" / "MASK" / "r0.png"
        Image.open(path).resize((7, 5)).save(path)
        refused(script(*tuning(split, pretrained)), "r0.png", "5x7", "16x20")

    def test_a_class_too_high(self, script, pretrained, split):
        path = split / "TRAIN" / "MASK" / "r2.png"
        mask = np.zeros((16, 20), np.uint8)
        mask[0, 0] = 9
        Image.fromarray(mask).save(path)
        refused(script(*tuning(split, pretrained), "--out_channels", 3), "r2.png", "9", "0 to 2")

    def test_a_black_and_white_mask(self, script, pretrained, split):
        path = split / "TRAIN" / "MASK" / "r2.png"
        mask = np.zeros((16, 20), np.uint8)
        mask[:8] = 255
        Image.fromarray(mask).save(path)
        ended = script(*tuning(split, pretrained), "--out_channels", 7)
        refused(ended, "MASK/r2.png", "{0, 255}", "7 classes allow 0 to 6", "--fix-issues")

    def test_a_colour_mask(self, script, pretrained, split):
        path = split / "TRAIN" / "MASK" / "r2.png"
        Image.fromarray(np.full((16, 20, 3), (255, 0, 9), np.uint8)).save(path)
        refused(script(*tuning(split, pretrained)), "r2.png", "rgb2tif")

    def test_a_missing_checkpoint(self, script, split):
        refused(script(*tuning(split, "gone.pt")), "gone.pt")

    def test_a_checkpoint_of_another_architecture(self, script, pretrained, split, tmp_path):
        other = tmp_path / "other" / "model.pt"
        other.parent.mkdir()
        shutil.copy(pretrained.parent / "config.json", other.parent)
        state = th.load(pretrained, weights_only=True)
        th.save({k: v.repeat(*([2] * v.ndim)) for k, v in state.items()}, other)
        refused(
            script(*tuning(split, other)), "model.pt", "time_embed.0.weight", "256x64", "128x32"
        )

    def test_a_file_that_is_no_checkpoint(self, script, split, tmp_path):
        (tmp_path / "model.pt").write_text("not a checkpoint")
        refused(
            script(*tuning(split, tmp_path / "model.pt")), "model.pt", "not a readable checkpoint"
        )

    def test_a_share_out_of_range(self, script, pretrained, split):
        ended = script(*tuning(split, pretrained), "--unfreeze_decoder", 3)
        refused(ended, "--unfreeze_decoder 3", "between 0 and 1")

    def test_validation_images_without_masks(self, script, pretrained, split):
        argv = ["finetune.py", pretrained, split / "TRAIN/IMG", split / "TRAIN/MASK"]
        refused(script(*argv, split / "VAL/IMG"), "VAL_MASK")

    def test_a_class_table_of_another_length(self, script, pretrained, split, tmp_path):
        table = '[{"index":0,"name":"none","color":[0,0,0]},{"index":1,"name":"x","color":[9,8,7]}]'
        (tmp_path / "c.json").write_text(table)
        ended = script(*tuning(split, pretrained), "--out_channels", 3, "--categories", "c.json")
        refused(ended, "c.json", "2", "3")


@pytest.mark.parametrize("name", ["image_train.py", "finetune.py", "predict.py", "evaluate.py"])
def test_help_is_there(script, name):
    ended = script(name, "--help")
    assert ended.code == 0
    assert "default" in ended.out
