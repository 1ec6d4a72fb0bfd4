"""flags/*.sh give the same words in bash and in zsh, and networks that build."""

import re
import shutil
import subprocess

import pytest
import torch as th
from paths import ROOT

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.runtime.flags import from_flags, make_parser, parse_flags
from guided_diffusion.training.run import TrainConfig

FLAGS = ROOT / "flags"
SHELLS = [
    pytest.param(
        shell, marks=pytest.mark.skipif(not shutil.which(shell), reason=f"no {shell} here")
    )
    for shell in ("bash", "zsh")
]


def words(shell: str, file: str, expression: str, **env: str) -> list[str]:
    """The arguments that a command gets for an expression after `source FILE`."""
    script = f"source '{FLAGS / file}'; printf '%s\\n' {expression}"
    environment = {"PATH": "/usr/bin:/bin", **env}
    out = subprocess.run([shell, "-c", script], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert not out.stderr
    return out.stdout.split("\n")[:-1]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("file", ["unet.sh", "unet_small.sh", "demo.sh"])
@pytest.mark.parametrize("form", ["$MODEL_FLAGS", "$(eval echo $MODEL_FLAGS)"])
def test_flags_become_words_and_build(shell, file, form):
    model_words = words(shell, file, form)
    others = words(shell, file, "$DIFFUSION_FLAGS $TRAIN_FLAGS")
    parser = make_parser("", TrainConfig, ModelConfig, DiffusionConfig, ReadingConfig)
    overrides = parse_flags(parser, model_words + others)
    config = from_flags(ModelConfig, overrides)
    assert config.learn_sigma
    assert config.image_size == (256 if file == "unet.sh" else 64)
    assert from_flags(DiffusionConfig, overrides).build().original_num_steps == 4000
    with th.device("meta"):
        config.build()


def test_unet_sh_is_the_papers_network():
    overrides = parse_flags(make_parser("", ModelConfig), words("bash", "unet.sh", "$MODEL_FLAGS"))
    config = from_flags(ModelConfig, overrides)
    assert config.mult() == (1, 1, 2, 2, 4, 4)
    assert (config.num_channels, config.num_res_blocks, config.num_head_channels) == (128, 2, 64)
    assert config.resblock_updown
    assert config.use_scale_shift_norm
    assert config.attention_resolutions == "32,16,8"


@pytest.mark.parametrize("shell", SHELLS)
def test_logdir_has_a_default_and_a_given_one_stays(shell):
    assert words(shell, "unet.sh", '"$OPENAI_LOGDIR"') == ["runs/unet"]
    assert words(shell, "unet.sh", '"$OPENAI_LOGDIR"', OPENAI_LOGDIR="/a b") == ["/a b"]


@pytest.mark.parametrize("shell", SHELLS)
def test_sample_flags_are_set(shell):
    assert "--num_samples" in words(shell, "unet_small.sh", "$SAMPLE_FLAGS")


def test_every_choice_has_a_comment_that_names_its_source():
    text = (FLAGS / "unet.sh").read_text()
    assert len(re.findall(r"(table|section|appendi)", text)) >= 8
