"""What all commands have in common: -o, --checkpoint, --device, --quiet; results on stdout."""

import pytest
from commands_util import all_commands, arguments, path_of, prepare_commands
from conftest import digests
from test_command_precision import COMPUTING, WITHOUT_NETWORK

from guided_diffusion.runtime import messages
from guided_diffusion.runtime.command_line.commands import parser_of
from guided_diffusion.runtime.command_line.parsing import parse_flags
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar, track
from guided_diffusion.training.run import run_folder

_FOLDERS = "a b c d"
# by command: the other arguments, and the flag or the position that -o and --output stand for
OUTPUT = {
    **dict.fromkeys(["image_train.py", "super_res_train.py", "classifier_train.py"], ("", "-o")),
    "mask_diffusion_train.py": (_FOLDERS, "-o"),
    "finetune.py": (f"x {_FOLDERS}", "--weights_save"),
    "baseline_train.py": (_FOLDERS, "--weights_save"),
    "label_efficiency.py": (_FOLDERS, "-o"),
    "simulate_loop.py": (_FOLDERS, "-o"),
    "probe.py": ("run split", "-o"),
    "predict.py": ("model image", "-o"),
    "evaluate.py": ("a b", "-o"),
    "evaluate_guidance.py": ("model folder", "-o"),
    "evaluate_samples.py": ("a b", "--out_dir"),
    **dict.fromkeys(["image_sample.py", "classifier_sample.py"], ("", "--out_dir")),
    **dict.fromkeys(["super_res_sample.py", "image_nll.py"], ("", "--out_dir")),
    "export_onnx.py": ("model", ""),
    "pack_model.py": ("model", ""),
    "prepare_data.py": ("", "--output_dir"),
    "serve.py": ("model", "--save_dir"),
    "rgb2tif.py": ("masks", ""),
    "export_labels.py": ("masks images", ""),
    "import_labels.py": ("source", ""),
}
# the same of --checkpoint; "" stands for the first position
CHECKPOINT = {
    "image_train.py": ("", "--init_checkpoint"),
    "mask_diffusion_train.py": (_FOLDERS, "--init_checkpoint"),
    "finetune.py": (_FOLDERS, ""),
    "evaluate.py": ("a b", "--model"),
    "predict.py": ("image", "--model"),
    "evaluate_guidance.py": ("folder", ""),
    "evaluate_samples.py": ("a b", "--model_path"),
    **dict.fromkeys(["image_sample.py", "classifier_sample.py"], ("", "--model_path")),
    **dict.fromkeys(["super_res_sample.py", "image_nll.py"], ("", "--model_path")),
    "export_onnx.py": ("", ""),
    "pack_model.py": ("out", ""),
    "serve.py": ("", ""),
    **dict.fromkeys(["baseline_train.py", "label_efficiency.py"], (_FOLDERS, "--checkpoint")),
    "simulate_loop.py": (_FOLDERS, "--checkpoint"),
    "prepare_data.py": ("", "--checkpoint"),
}
# those that start from no network
WITHOUT = {
    *("super_res_train.py", "classifier_train.py", "probe.py", "rgb2tif.py"),
    *("export_labels.py", "import_labels.py"),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return prepare_commands(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def quiet(script, workshop, tmp_path, monkeypatch):
    """Runs a command of COMMANDS with further flags, in the workshop."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "out"))
    monkeypatch.delenv("OPENAI_LOG_FORMAT", raising=False)
    monkeypatch.delenv("GUIDED_DIFFUSION_DEVICE", raising=False)

    def call(name, *flags):
        return script(name, *arguments(name, str(tmp_path / "out")), *flags)

    return call


def parsed(name, *words):
    return parse_flags(parser_of(path_of(name)), " ".join(words).split())


def test_all_commands_are_in_the_tables():
    assert sorted(OUTPUT) == all_commands()
    assert sorted({*CHECKPOINT, *WITHOUT}) == all_commands()


@pytest.mark.parametrize("name", sorted(OUTPUT))
def test_the_output_is_called_the_same_everywhere(name):
    others, spelling = OUTPUT[name]
    expected = parsed(name, others, spelling, "OUT")
    assert "OUT" in expected.values() or ["OUT"] in expected.values()
    for words in ("-o OUT", "--output OUT", "--output=OUT"):
        assert parsed(name, others, words) == expected
        if name != "predict.py":  # whose -o takes several
            assert parsed(name, words, others) == expected


@pytest.mark.parametrize("name", sorted(CHECKPOINT))
def test_a_checkpoint_is_called_the_same_everywhere(name):
    others, spelling = CHECKPOINT[name]
    expected = parsed(name, spelling, "net.pt", others)
    assert "net.pt" in expected.values()
    assert parsed(name, others, "--checkpoint net.pt") == expected
    assert parsed(name, "--checkpoint=net.pt", others) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("finetune.py", "x a b c d --checkpoint y"),
        ("export_onnx.py", "model out.onnx --checkpoint y"),
        ("pack_model.py", "model out -o y"),
        ("import_labels.py", "source out --output y"),
        ("rgb2tif.py", "masks out --output y"),
    ],
)
def test_the_flag_and_the_argument_are_one_too_many(name, words):
    with pytest.raises(UserError, match=r"unrecognized arguments: \w"):
        parsed(name, words)


def test_a_parser_is_used_again(tmp_path):
    parser = parser_of(path_of("finetune.py"))
    (tmp_path / "flags.yaml").write_text("checkpoint: x\n")
    found = parse_flags(parser, ["--checkpoint", "x", "a", "b"])
    assert parse_flags(parser, ["--config", str(tmp_path / "flags.yaml"), "a", "b"]) == found
    assert parse_flags(parser, ["x", "a", "b"]) == found


def test_the_run_folder_is_output_or_the_variable(quiet, tmp_path, monkeypatch):
    assert run_folder({}) == str(tmp_path / "out")
    assert run_folder({"output": "there"}) == "there"
    done = quiet("image_train.py", "--output", tmp_path / "there")
    assert done.code == 0, done.err
    assert done.out == f"run folder: {tmp_path}/there\n"
    assert (tmp_path / "there" / "config.json").exists()
    assert f"there is used, not OPENAI_LOGDIR, which is {tmp_path}/out" in done.err
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_mask_diffusion_model(quiet, tmp_path):
    folder = tmp_path / "there"
    done = quiet("mask_diffusion_train.py", "--quiet", "-o", folder, "--weights_save", "")
    assert done.out == f"run folder: {folder}\nsegmentation model: {folder}/segm.pth\n", done.err
    assert (folder / "segm.pth").exists()
    done = quiet("mask_diffusion_train.py", "-o", "segm.pth")
    assert (done.code, "--weights_save names the model file" in done.err) == (2, True)


@pytest.mark.parametrize("name", all_commands())
def test_every_command_can_be_quiet_and_those_that_compute_have_a_device(name):
    found = parser_of(path_of(name)).defaults
    assert "quiet" in found
    assert ("device" in found) == (name in {*COMPUTING, "probe.py", "prepare_data.py"})


@pytest.mark.parametrize("name", sorted({*WITHOUT_NETWORK, "probe.py"} - {"prepare_data.py"}))
def test_quiet_leaves_the_results(quiet, name):
    """Of the commands that compute, see test_command_precision.py."""
    done = quiet(name, "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_warnings_are_shown_all_the_same(quiet):
    done = quiet("prepare_data.py", "--quiet")
    assert done.err.startswith("warning: nothing tells which images are of one patient")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", sorted({*COMPUTING, "probe.py"}))
def test_a_device_that_is_not_there(quiet, workshop, tmp_path, name):
    before = digests(workshop)
    ended = quiet(name, "--device", "cuda:7")
    assert ended.code == 2
    assert ended.err.startswith("error: --device is cuda:7, but torch sees ")
    assert ended.err.count("\n") == 1
    assert digests(workshop) == before
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_no_device(quiet):
    ended = quiet("predict.py", "--device", "gpu")
    assert ended.code == 2
    assert "'gpu' is none of cpu, cuda, cuda:N (cuda:1) and mps" in ended.err


@pytest.mark.parametrize("name", ["predict.py", "image_sample.py", "evaluate.py"])
def test_the_device_is_named_first(quiet, name):
    done = quiet(name, "--device", "cpu")
    assert done.code == 0, done.err
    assert done.err.startswith("device: cpu (")
    assert "device: " not in done.out


class TestBars:
    """Standard error is no terminal here."""

    def test_short_work_leaves_none(self, capsys):
        with progress_bar(3) as bar:
            for _ in range(3):
                bar.update()
        assert list(track(range(3), "reading")) == [0, 1, 2]
        assert capsys.readouterr().err == ""

    def test_long_work_is_a_line_now_and_then(self, capsys, monkeypatch):
        monkeypatch.setattr("guided_diffusion.runtime.progress.LINE_S", 0.0)
        with progress_bar(3, "image") as bar:
            for _ in range(3):
                bar.update()
            messages.say("above")
        lines = capsys.readouterr().err.split("\n")
        assert not any("\r" in line for line in lines)
        assert [line[:4] for line in lines[1:4]] == ["33%|", "67%|", "100%"]
        assert lines[4] == "above"
