"""Outputs that cannot be written: every command says so in one line, before its work if it can."""

import errno
import os
import re
import subprocess
import sys

import pytest
from commands_util import COMMANDS, all_commands, arguments, prepare_commands
from conftest import digests
from paths import ROOT

from guided_diffusion.runtime.errors import EXIT_INTERRUPTED, UserError, as_user_error, command
from guided_diffusion.runtime.storage.files import check_output, check_outputs, write_atomically

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = prepare_commands(tmp_path_factory.mktemp("workshop"))
    (folder / "file").write_text("in the way")
    return folder


@pytest.fixture
def run(script, workshop, tmp_path, monkeypatch):
    """Runs a command of COMMANDS in the workshop, with an output."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv,log")

    def start(name, out):
        monkeypatch.setenv("OPENAI_LOGDIR", str(out))
        return script(name, *arguments(name, str(out)))

    return start


def the_line(ended, code=2):
    """The one line of an error."""
    assert ended.code == code, (ended.out, ended.err)
    errors = re.findall(r"^error: .*", ended.err, re.MULTILINE)  # a progress bar may stand before
    assert len(errors) == 1, ended.err
    assert "Traceback" not in ended.err
    return errors[0]


def test_every_command_is_tried():
    assert sorted(COMMANDS) == all_commands()


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"serve.py"}))
class TestEveryCommand:
    def test_a_file_in_the_way_of_a_folder(self, run, workshop, name):
        before = digests(workshop)
        line = the_line(run(name, "file/below/out"))
        assert line.startswith("error: cannot write file/below/out")
        assert "a file is in the way of a folder; name another place" in line
        assert digests(workshop) == before

    def test_a_file_for_a_folder_and_the_reverse(self, run, workshop, tmp_path, name):
        out = tmp_path / "out"
        for word in arguments(name, str(out)):
            if word.startswith(f"{out}."):
                (tmp_path / os.path.basename(word)).mkdir()
        out.write_text("")
        before = digests(workshop)
        the_line(run(name, out))
        assert digests(workshop) == before
        assert out.read_text() == ""

    def test_a_name_that_is_too_long(self, run, workshop, name):
        before = digests(workshop)
        assert "the name is too long" in the_line(run(name, f"new/{'x' * 300}"))
        assert digests(workshop) == before

    def test_the_disk_is_full_at_the_start(self, run, workshop, tmp_path, monkeypatch, name):
        def fsync(descriptor):
            raise FULL

        before = digests(workshop)
        monkeypatch.setattr(os, "fsync", fsync)
        line = the_line(run(name, tmp_path / "out"))
        assert line.startswith("error: no space left to write ")
        assert digests(workshop) == before
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("number", [0, 2])
    def test_the_disk_fills_up_during_the_work(self, run, tmp_path, monkeypatch, name, number):
        if name == "export_onnx.py" and number:
            pytest.skip("writes a single file, after seconds")
        replace, calls = os.replace, []

        def fill(source, target):
            calls.append(target)
            if len(calls) > number:
                raise FULL
            replace(source, target)

        monkeypatch.setattr(os, "replace", fill)
        ended = run(name, tmp_path / "out")
        if len(calls) <= number:  # so many files it does not write
            assert ended.code == 0
            return
        line = the_line(ended)
        assert line.startswith(f"error: no space left to write {tmp_path / 'out'}")
        assert "rerun the command; files that were written before are intact" in line

    def test_ctrl_c(self, run, tmp_path, monkeypatch, name):
        def interrupt(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        ended = run(name, tmp_path / "out")
        assert the_line(ended, EXIT_INTERRUPTED) == "error: interrupted"
        assert not list(tmp_path.rglob("*.tmp"))


def test_a_limit_on_file_sizes(workshop, tmp_path):
    """Without any help by this test's own process."""
    words = [sys.executable, "-B", str(ROOT / "tools/rgb2tif.py")]
    words += arguments("rgb2tif.py", str(tmp_path / "out"))
    limited = ["bash", "-c", 'ulimit -f 0; exec "$@"', "-", *words]
    ended = subprocess.run(limited, cwd=workshop, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "is larger than the limit on file sizes allows (ulimit -f)" in line


class TestCheckOutput:
    def test_it_leaves_nothing_behind(self, tmp_path):
        check_output(str(tmp_path / "a" / "b.txt"))
        check_output(str(tmp_path / "a" / "b"), folder=True)
        check_outputs([str(tmp_path / "a" / "b" / "c"), str(tmp_path / "d")])
        assert not list(tmp_path.iterdir())

    def test_what_exists_may_be_replaced(self, tmp_path):
        (tmp_path / "file").write_text("")
        check_output(str(tmp_path / "file"))
        check_output(str(tmp_path), folder=True)

    def test_what_is_no_regular_file_is_left_alone(self):
        with pytest.raises(UserError, match="/dev/null: it is not a regular file"):
            check_output("/dev/null")

    def test_a_link_to_nowhere(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match="in the way"):
            check_output(str(tmp_path / "link"), folder=True)
        with pytest.raises(UserError, match="in the way"):
            check_output(str(tmp_path / "link" / "x"))

    @pytest.mark.parametrize(
        ("number", "said"),
        [
            (errno.EROFS, "cannot write .*: the file system is read-only"),
            (errno.EACCES, "cannot write .*: permission denied"),
            (errno.EDQUOT, "no space left to write .*quota"),
            (errno.EIO, "cannot write .*: Input/output error; files written before are intact"),
        ],
    )
    def test_whatever_the_system_says(self, tmp_path, monkeypatch, number, said):
        def refuse(descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match=said):
            check_output(str(tmp_path / "x"))
        with pytest.raises(UserError, match=said):
            write_atomically(str(tmp_path / "x"), lambda file: file.write(b"x"))
        assert not list(tmp_path.iterdir())

    def test_one_of_many_is_a_folder(self, tmp_path):
        (tmp_path / "b").mkdir()
        with pytest.raises(UserError, match="b: it is a folder; name a file"):
            check_outputs([str(tmp_path / "a"), str(tmp_path / "b")])


def test_the_longest_names_can_be_written(tmp_path):
    for letter in "ab":
        path = tmp_path / (letter * 255)
        write_atomically(str(path), lambda file, letter=letter: file.write(letter.encode()))
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["a", "b"]


class TestTheTopLevel:
    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (FULL, "no space left to write the output"),
            (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "a.png: No such file"),
            (MemoryError("Unable to allocate 8 EiB"), "out of memory (Unable to allocate 8 EiB)"),
            (RuntimeError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory."),
        ],
    )
    def test_errors_of_the_system_are_one_line(self, capsys, error, said):
        @command
        def main():
            raise error

        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert said in capsys.readouterr().err

    def test_faults_of_the_program_keep_their_traceback(self):
        @command
        def main():
            try:
                raise FileNotFoundError(errno.ENOENT, "No such file")
            except OSError:
                raise KeyError("x")  # noqa: B904 - the context is what matters

        with pytest.raises(KeyError):
            main()

    def test_an_error_that_torch_wraps(self):
        error = RuntimeError("unexpected pos 64 vs 0")
        error.__context__ = FULL
        assert "no space left" in str(as_user_error(error))

    def test_the_reader_of_the_output_leaves(self, capsys):
        @command
        def main():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 141
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("raised", "code", "said"),
        [
            ("KeyboardInterrupt", 130, "error: interrupted\n"),
            ("FileNotFoundError(2, 'No usable temporary directory')", 2, "error: No usable temp"),
            ("UserError('no')", 2, "error: no\n"),
        ],
    )
    def test_before_it_begins(self, raised, code, said):
        """While a script still imports what it needs."""
        program = "from guided_diffusion.runtime.errors import UserError, report_early"
        words = [sys.executable, "-c", f"{program}; report_early(); raise {raised}"]
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == code
        assert ended.stderr.startswith(said)
        assert ended.stderr.count("\n") == 1
