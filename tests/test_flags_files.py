"""flags/*.sh give the same words in bash and in zsh, and networks that build."""

import re
import shutil
import subprocess

import pytest
import torch as th
from commands_util import all_commands, path_of
from conftest import draw_pairs
from paths import ROOT

from guided_diffusion.gaussian_diffusion import LossType
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, ModelConfig
from guided_diffusion.runtime.command_line.commands import parser_of
from guided_diffusion.runtime.command_line.flags import from_flags
from guided_diffusion.runtime.command_line.parsing import make_parser, parse_flags
from guided_diffusion.segmentation.model_file import load_model
from guided_diffusion.training.run import TrainConfig

FLAGS = ROOT / "flags"
FILES = sorted(path.name for path in FLAGS.glob("*.sh"))
# what a flag file's own network and steps shrink to here
TOY = ["--image_size", "32", "--num_channels", "32", "--num_res_blocks", "1"]
TOY += ["--num_head_channels", "16", "--batch_size", "2"]
ONE_STEP = ["--max_steps", "1", "--sample_interval", "0"]
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


def parser_of_flags(name: str):
    """A command's parser without its arguments, which a line of flags alone lacks."""
    parser = parser_of(path_of(name))
    parser._positionals._group_actions.clear()
    parser._actions = [action for action in parser._actions if action.option_strings]
    return parser


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("file", FILES)
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


@pytest.mark.parametrize("path", sorted(FLAGS.glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("image_train.py", "$MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS"),
        ("image_sample.py", "$MODEL_FLAGS $DIFFUSION_FLAGS $SAMPLE_FLAGS"),
        ("finetune.py", "$MODEL_FLAGS $DIFFUSION_FLAGS $FINETUNE_FLAGS"),
    ],
)
def test_yaml_files_say_the_same(path, name, variables):
    parser = parser_of_flags(name)
    sourced = parse_flags(parser, words("bash", f"{path.stem}.sh", variables))
    assert parse_flags(parser, ["--config", str(path)]) == sourced


@pytest.mark.parametrize("name", all_commands())
def test_every_command_takes_a_yaml_file(name):
    """Also those that it holds no flag for."""
    parser = parser_of_flags(name)
    assert "config" not in parse_flags(parser, ["--config", str(FLAGS / "unet.yaml")])


def test_unet_sh_is_the_papers_network():
    overrides = parse_flags(make_parser("", ModelConfig), words("bash", "unet.sh", "$MODEL_FLAGS"))
    config = from_flags(ModelConfig, overrides)
    assert config.mult() == (1, 1, 2, 2, 4, 4)
    assert (config.num_channels, config.num_res_blocks, config.num_head_channels) == (128, 2, 64)
    assert config.resblock_updown
    assert config.use_scale_shift_norm
    assert config.attention_resolutions == "32,16,8"


def test_unet_sh_weighs_the_variational_bound_as_the_paper_does():
    given = words("bash", "unet.sh", "$DIFFUSION_FLAGS")
    flags = {**parse_flags(make_parser("", DiffusionConfig), given), "learn_sigma": True}
    process = from_flags(DiffusionConfig, flags).build()
    assert process.loss_type == LossType.RESCALED_MSE
    assert process.original_num_steps == 4000


@pytest.mark.parametrize("shell", SHELLS)
def test_logdir_has_a_default_and_a_given_one_stays(shell):
    assert words(shell, "unet.sh", '"$OPENAI_LOGDIR"') == ["runs/unet"]
    assert words(shell, "unet.sh", '"$OPENAI_LOGDIR"', OPENAI_LOGDIR="/a b") == ["/a b"]


@pytest.mark.parametrize("shell", SHELLS)
def test_sample_and_finetune_flags_are_words(shell):
    assert "--num_samples" in words(shell, "unet_small.sh", "$SAMPLE_FLAGS")
    assert words(shell, "unet_small.sh", "$FINETUNE_FLAGS") == ["--partner", "imagenet"]


def test_every_choice_has_a_comment_that_names_its_source():
    text = (FLAGS / "unet.sh").read_text()
    assert len(re.findall(r"(table|section|appendi)", text)) >= 8


@pytest.mark.parametrize("file", FILES)
class TestOnACpu:
    """The words of a flag file, as bash gives them, in every script that takes them."""

    @pytest.fixture(autouse=True)
    def _cpu(self, monkeypatch):
        monkeypatch.setenv("GUIDED_DIFFUSION_DEVICE", "cpu")

    def test_dry_run(self, script, file):
        flags = words("bash", file, "$MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS")
        guided = ["--segmentation_guided", "True", "--num_segmentation_classes", "3"]
        # with masks once; a trial takes its time
        for more in ([], guided) if file == "demo.sh" else ([],):
            ended = script("image_train.py", *flags, *TOY, "--dry_run", "True", *more)
            assert ended.code == 0, ended.err
            assert "seconds per step" in ended.out
            assert ("training in float32 on the CPU" in ended.err) == ("--use_fp16" in flags)

    def test_pretraining_and_what_follows(self, script, file, tmp_path, monkeypatch):
        def run(name, *arguments):
            ended = script(name, *arguments)
            assert ended.code == 0, ended.err
            return ended.err

        model, diffusion, train, sample = (
            words("bash", file, f"${group}_FLAGS")
            for group in ("MODEL", "DIFFUSION", "TRAIN", "SAMPLE")
        )
        finetune = [] if file == "demo.sh" else words("bash", file, "$FINETUNE_FLAGS")
        draw_pairs(tmp_path / "data", 4, size=(32, 32))
        images, masks = tmp_path / "data" / "IMG", tmp_path / "data" / "MASK"
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
        data = ["--data_dir", images]
        said = run("image_train.py", *data, *model, *diffusion, *train, *TOY, *ONE_STEP)
        assert ("training in float32 on the CPU" in said) == ("--use_fp16" in model)
        checkpoint = ["--model_path", tmp_path / "run" / "model000001.pt"]

        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "samples"))
        steps = ["--steps", 2] if "--steps" in sample else ["--timestep_respacing", 2]
        run("image_sample.py", *checkpoint, *sample, *steps, "--num_samples", 1)
        run("image_nll.py", *checkpoint, *data, "--timestep_respacing", 2, "--num_samples", 1)
        # as users of the original package do, with the flags of the network once more
        same = [*model, *TOY, *diffusion]
        run("image_sample.py", *checkpoint, *same, *sample, *steps, "--num_samples", 1)
        tuned = ["--epochs", 1, "--out_channels", 3, "--weights_save", tmp_path / "segm.pth"]
        run("finetune.py", checkpoint[1], images, masks, *same, *finetune, *tuned)
        assert load_model(str(tmp_path / "segm.pth"))[1].kind == ("union" if finetune else "unet")

    def test_other_trainings(self, script, file, tmp_path, monkeypatch):
        model, diffusion, train = (
            words("bash", file, f"${group}_FLAGS") for group in ("MODEL", "DIFFUSION", "TRAIN")
        )
        draw_pairs(tmp_path / "data", 4, size=(32, 32))
        images, masks = tmp_path / "data" / "IMG", tmp_path / "data" / "MASK"
        size = ["--large_size", "32", "--small_size", "16"]
        short = ["--image_size", "32", "--classifier_width", "64", "--iterations", "1"]
        trainings = {
            "super_res_train.py": [*model, *diffusion, *train, *TOY, *ONE_STEP, *size],
            "classifier_train.py": [*diffusion, *short, "--batch_size", "2"],
        }
        for name, flags in trainings.items():
            monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / name))
            ended = script(name, "--data_dir", images, *flags)
            assert ended.code == 0, ended.err
        flags = [*model, *diffusion, *TOY, "--steps", "1", "--out_channels", "3"]
        flags += ["--weights_save", "mask/segm.pth"]
        ended = script("mask_diffusion_train.py", images, masks, *flags)
        assert ended.code == 0, ended.err
