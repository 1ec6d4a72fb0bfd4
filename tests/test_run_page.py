"""Pages of the documentation run as they stand; so the commands of the first week can be run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from guided_diffusion.runtime.errors import UserError

sys.path.insert(0, str(ROOT / "tools" / "documentation"))
import run_page

WRITE = "import sys\nopen('said', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
PAGE = """# A page

```console
$ python say.py not this
```

```sh
# not a command
place="a b"
python say.py one \\
    two

python other.py "$place"
```

Prose after a block.

    python say.py nor this

```sh
python say.py $(echo three)
```
"""


@pytest.fixture
def folder(tmp_path):
    """A folder whose scripts write down their arguments."""
    for name in ("say.py", "other.py"):
        (tmp_path / name).write_text(WRITE)
    return tmp_path


def run(folder: Path, text: str, added: dict[str, str]) -> subprocess.CompletedProcess[str]:
    page, toy = folder / "page.md", folder / "toy.json"
    page.write_text(text)
    toy.write_text(json.dumps(added))
    tool = [sys.executable, str(ROOT / "tools" / "documentation" / "run_page.py")]
    return subprocess.run(
        [*tool, str(page), str(folder), "--toy", str(toy)], capture_output=True, text=True
    )


def test_commands_are_the_lines_of_its_blocks():
    found = run_page.commands(PAGE)
    assert [number for number, _ in found] == [9, 10, 13, 21]
    assert found[1][1] == "python say.py one \\\n    two"
    assert found[3][1] == "python say.py $(echo three)"


@pytest.mark.parametrize(
    ("text", "said"), [("```sh\ntrue\n", "does not end"), ("```sh\ntrue \\\n```\n", "line 2")]
)
def test_unfinished_blocks_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        run_page.commands(text)


def test_they_run_in_one_shell_with_the_toys_flags(folder):
    ended = run(folder, PAGE, {"other.py": "--steps 20 --k '4 5'"})
    assert ended.returncode == 0, ended.stderr
    said = (folder / "said").read_text().splitlines()
    assert said == ["one two", "a b --steps 20 --k 4 5", "three"]
    assert "$ python say.py one \\\n    two" in ended.stdout
    assert "with --steps 20 --k '4 5'" in ended.stdout


def test_the_first_failure_ends_it(folder):
    text = "```sh\npython say.py one\n\npython none.py\npython say.py two\n```\n"
    ended = run(folder, text, {})
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == f"error: {folder}/page.md, line 4: exit code 2"
    assert (folder / "said").read_text() == "one\n"


@pytest.mark.parametrize("toy", ["[]", '{"a.py": 3}', "{"])
def test_a_wrong_toy_is_refused(tmp_path, toy):
    (tmp_path / "toy.json").write_text(toy)
    with pytest.raises(UserError, match=r"toy\.json"):
        run_page.read_toy(tmp_path / "toy.json")


class TestTheFirstWeek:
    found = run_page.commands((ROOT / "docs" / "first-week.md").read_text(encoding="utf-8"))

    def scripts(self) -> set[str]:
        return {name for _, text in self.found for name in re.findall(r"python (\S+)", text)}

    def test_goes_the_whole_way(self):
        wanted = ["image_train", "finetune", "predict", "evaluate", "label_efficiency"]
        assert {f"scripts/{name}.py" for name in wanted} <= self.scripts()
        assert {"tools/import_labels.py", "tools/prepare_data.py"} <= self.scripts()
        assert all((ROOT / name).is_file() for name in self.scripts())

    def test_every_line_is_a_command(self):
        """Not prose that a block has swallowed."""
        begins = re.compile(r"(python|source|export|mv|cp) |checkpoint=")
        assert all(begins.match(text) for _, text in self.found)

    def test_uses_every_script_that_the_toy_knows(self):
        assert run_page.read_toy(ROOT / "tools" / "bitewings.json").keys() <= self.scripts()

    def test_the_container_installs_what_it_needs_and_runs_it(self):
        made = (ROOT / "Dockerfile").read_text()
        extras = re.findall(r"--editable '\.\[(.*)\]'", made)[0].split(",")
        assert {"annotations", "imagenet"} <= set(extras)
        known = (ROOT / "setup.py").read_text()
        assert all(f'"{extra}": ' in known for extra in extras)
        ran = json.loads(re.findall(r"^CMD (.*)$", made, re.MULTILINE)[0])
        assert ran[:2] == ["bash", "tools/bitewings.sh"]
        assert "docs/first-week.md" in (ROOT / ran[1]).read_text()
