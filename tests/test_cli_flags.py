"""Every script of the original has the original's flags with their defaults."""

import json

import pytest
from commands_util import path_of
from golden_util import GOLDEN
from sampling_util import write_shapes

from guided_diffusion.runtime.command_line.commands import parser_of
from guided_diffusion.runtime.command_line.parsing import parse_flags

ORIGINAL = json.loads((GOLDEN / "cli_flags.json").read_text())


@pytest.mark.parametrize("name", sorted(ORIGINAL))
def test_the_originals_flags_and_defaults(name):
    parser = parser_of(path_of(name))
    theirs, defaults = ORIGINAL[name], parser.defaults
    assert {k: defaults.get(k, "missing") for k in theirs} == theirs
    for flag, default in theirs.items():
        assert type(defaults[flag]) is type(default), flag
        value = {"schedule_sampler": "uniform"}.get(flag, str(default))
        for spelling in (flag, flag.replace("_", "-")):
            found = parse_flags(parser, [f"--{spelling}", value])
            assert found == {flag: default}


@pytest.mark.parametrize("size", [64, 128])
def test_flag_lines_of_improved_diffusion_run(script, tmp_path, monkeypatch, size):
    """But for the number of channels, as they stand in that package's README."""
    write_shapes(tmp_path / "data", count=2, size=size)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
    model = (
        "--attention_resolutions 32,16 --class_cond False --diffusion_steps 4000 --dropout 0.1"
        f" --image_size {size} --learn_sigma True --noise_schedule linear --num_channels 32"
        " --num_res_blocks 2 --use_scale_shift_norm True"
    ).split()
    train = ("--lr", "1e-4", "--batch_size", 1, "--max_steps", 1, "--data_dir", tmp_path / "data")
    done = script("image_train.py", *model, *train)
    assert done.code == 0, done.err
    sample = ("--num_samples", 1, "--timestep_respacing", "ddim2", "--use_ddim", "True")
    path = tmp_path / "run" / "ema_0.9999_000001.pt"
    done = script("image_sample.py", "--model_path", path, *model, *sample)
    assert done.code == 0, done.err
    assert list((tmp_path / "run" / "samples").glob(f"*/samples_1x{size}x{size}x1.npz"))
