"""tools/loop.sh: its commands, in its order, on toy data and networks."""

import csv
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import digests, run_script
from paths import ROOT
from PIL import Image

# what makes each command quick; the last of several values of a flag counts
TOY = {
    "create-sample": "--image-size 32 --num-samples 26 --train-images 23",
    "image_train.py": "--image_size 32 --num_channels 32 --channel_mult 1,2 --diffusion_steps 20"
    " --batch_size 2 --lr_anneal_steps 1 --save_interval 1",
    "finetune.py": "--steps 2 --augmentation none",
    "evaluate.py": "--bootstrap 20 --report False",
}
# a stand-in for python that hands its arguments to this process, where torch is loaded already
PYTHON = """#!/bin/bash
printf '%s\\0' "$@" > {requests}
exit "$(cat {answers})"
"""


class Shell:
    """Runs a script of the shell, and its Python commands in this process.

    :param watch: called with each command before it runs.
    """

    def __init__(self, folder: Path, watch):
        self.watch, self.said, self.ran = watch, "", []
        self.requests, self.answers = folder / "requests", folder / "answers"
        for pipe in (self.requests, self.answers):
            os.mkfifo(pipe)
        stub = folder / "bin/python"
        stub.parent.mkdir()
        stub.write_text(PYTHON.format(requests=self.requests, answers=self.answers))
        stub.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}

    def run(self, *command: str) -> int:
        """Run it to its end; returns the exit code."""
        ended = []

        def work():
            process = subprocess.run(
                command, cwd=ROOT, env=self.environment, capture_output=True, text=True
            )
            self.said += process.stdout + process.stderr
            ended.append(process.returncode)
            # so that nobody waits for a command that was killed
            answers = os.open(self.answers, os.O_RDONLY | os.O_NONBLOCK)
            self.requests.write_text("")
            os.close(answers)

        thread = threading.Thread(target=work)
        thread.start()
        while words := self.requests.read_text().split("\0")[:-1]:
            self.answers.write_text(str(self._python(*words)))
        thread.join()
        return ended[0]

    def _python(self, path: str, *arguments: str) -> int:
        assert (ROOT / path).is_file()
        name = Path(path).name
        self.watch(name, arguments)
        toy = TOY.get(name, "") + TOY.get(arguments[1] if len(arguments) > 1 else "", "")
        ended = run_script(name, *arguments, *toy.split())
        self.ran.append(name)
        self.said += ended.out + ended.err
        return ended.code


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_the_loop_as_its_page_describes_it(tmp_path, monkeypatch):
    out = tmp_path / "loop"
    logs = f"{out}/pretrained"
    monkeypatch.setenv("OPENAI_LOGDIR", logs)  # as the script sets it for its commands
    held_out = []

    def watch(name, arguments):
        if name == "finetune.py":
            held_out.append(digests(out / "data/Split/VAL"))

    shell = Shell(tmp_path, watch)
    monkeypatch.chdir(ROOT)
    assert shell.run("bash", "tools/loop.sh", str(out)) == 0, shell.said
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(held_out[0]) == 2 * 4
    assert shell.ran.count("import_labels.py") == 3
    assert "2 labels    6 labels   10 labels" in shell.said
    names = [set(), set()]
    for number in (1, 2):
        with open(out / f"round_{number}/results/LABEL_NEXT/label_next.csv") as file:
            names[number - 1] = {row["file"] for row in csv.DictReader(file)}
    first = {path.name for path in (out / "to_label/IMG").iterdir()}
    assert [len(first), *map(len, names)] == [6, 4, 4]
    assert len(first.union(*names)) == 14
    train = out / "data/Split/TRAIN"
    for path in (train / "MASK").iterdir():
        assert path.read_bytes() == (out / "truth" / path.name).read_bytes()
    assert {path.name for path in (train / "IMG").iterdir()} >= names[0] | names[1]
    with Image.open(out / "loop.png") as picture:
        assert picture.width > 5 * 3 * 32
    assert shell.run("bash", "tools/loop.sh", str(out)) == 2
    assert f"error: {out} exists" in shell.said
