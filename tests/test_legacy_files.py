"""Files that version 0.1.0 wrote resume, predict and evaluate as they did there.

`legacy/` holds a run folder of 2 steps, a fine-tuning stopped after 3 of 6 epochs, a finished
`segm.pth`, and what version 0.1.0 made of them when it went on.
"""

import csv
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch as th
from golden_util import relative
from PIL import Image

LEGACY = Path(__file__).parent / "legacy"
PRETRAINING = shlex.split(
    "--data_dir Split/TRAIN/IMG --image_size 16 --num_channels 4 --num_res_blocks 1"
    " --channel_mult 1,2 --attention_resolutions 8 --num_heads 1 --learn_sigma True"
    " --noise_schedule cosine --diffusion_steps 50 --batch_size 2 --lr 1e-3 --ema_rate 0.9"
    " --save_interval 2 --log_interval 1 --sample_interval 0 --max_steps 4"
)
FINETUNING = shlex.split(
    "run/ema_0.9_000002.pt Split/TRAIN/IMG Split/TRAIN/MASK Split/VAL/IMG Split/VAL/MASK"
    " --epochs 6 --lr 5e-3 --ema_rate 0.5 --augmentation light --weights_save stopped.pth"
)


@pytest.fixture
def legacy(tmp_path, monkeypatch):
    """A copy of the files, as the current folder."""
    shutil.copytree(LEGACY, tmp_path / "legacy")
    monkeypatch.chdir(tmp_path / "legacy")
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")
    return tmp_path / "legacy"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, th.Tensor]:
    values = th.load(path, weights_only=True)
    return values.get("state_dict", values)


def test_a_pretraining_run_resumes_as_it_would_have_gone_on(script, legacy, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", "run")
    assert script("image_train.py", *PRETRAINING).code == 0
    found, expected = rows(legacy / "run/progress.csv"), rows(legacy / "resumed_progress.csv")
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    for name in ("loss", "mse", "vb", "grad_norm"):
        values, wanted = ([float(row[name]) for row in table] for table in (found, expected))
        np.testing.assert_allclose(values, wanted, rtol=1e-3, err_msg=name)
    old, new = weights(legacy / "resumed_model000004.pt"), weights(legacy / "run/model000004.pt")
    assert old.keys() == new.keys()
    key = "input_blocks.1.0.in_layers.2.weight"
    assert relative(new[key], old[key]) < 1e-3
    assert relative(weights(legacy / "run/model000002.pt")[key], old[key]) > 1e-3


def test_a_checkpoint_samples(script, legacy):
    ended = script(
        "image_sample.py", "--model_path", "run/ema_0.9_000002.pt", "--num_samples", 2, "--steps",
        2, "--sampler", "dpm++2m", "--out_dir", "samples",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert len(list((legacy / "samples/png").glob("*.png"))) == 2


def test_a_fine_tuning_resumes_as_it_would_have_gone_on(script, legacy):
    before = weights(legacy / "stopped.pth")
    assert script("finetune.py", *FINETUNING).code == 0
    epochs = [row["epoch"] for row in rows(legacy / "stopped_logs/progress.csv")]
    assert epochs == ["1", "2", "3", "4", "5", "6"]
    old, new = weights(legacy / "resumed.pth"), weights(legacy / "stopped.pth")
    key = "out.2.weight"
    assert relative(new[key], old[key]) < 1e-2
    assert relative(before[key], old[key]) > 1e-2


def test_a_finished_fine_tuning_is_complete(script, legacy):
    assert script("finetune.py", *FINETUNING).code == 0
    again = script("finetune.py", *FINETUNING)
    assert (again.code, again.out.strip()) == (0, "this run is complete: nothing to do")


def test_a_model_file_predicts_the_same(script, legacy):
    assert script("predict.py", "segm.pth", "Split/VAL/IMG", "out").code == 0
    for name in ("r0", "r1"):
        found, expected = (
            np.asarray(Image.open(legacy / folder / f"{name}.png"))
            for folder in ("out/MASK", "predicted")
        )
        assert (found == expected).mean() > 0.99
    for found, expected in zip(rows(legacy / "out/areas.csv"), rows(legacy / "areas.csv")):
        assert found.keys() == expected.keys()
        assert float(found["uncertainty"]) == pytest.approx(
            float(expected["uncertainty"]), rel=0.01
        )


def test_a_model_file_evaluates_the_same(script, legacy):
    ended = script(
        "evaluate.py", "--model", "segm.pth", "Split/VAL/IMG", "Split/VAL/MASK", "--output", "eval"
    )
    assert ended.code == 0, ended.err
    for found, expected in zip(rows(legacy / "eval/per_image.csv"), rows(legacy / "per_image.csv")):
        assert found.keys() == expected.keys()
        assert float(found["mean_dice"]) == pytest.approx(float(expected["mean_dice"]), abs=0.02)
