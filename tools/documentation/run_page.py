"""Run the commands of a page of the documentation, in their order, in one shell.

run_page.py PAGE FOLDER [--toy FILE]

Commands are the lines of the page's blocks that are fenced as sh, continued by backslashes; blocks
of other kinds are not run. They run in FOLDER, which holds what the page expects to find. The first
one that fails ends the run with its exit code. FILE (JSON) gives flags that are added to a script's
commands: {"scripts/finetune.py": "--steps 20"}.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guided_diffusion.runtime.errors import UserError, command  # noqa: E402

FENCE = "```"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("page", help="page of the documentation, Markdown")
    made.add_argument("folder", help="folder to run the commands in")
    made.add_argument("--toy", metavar="FILE", help="flags to add to commands, JSON")
    return made


def main() -> int:
    given = parser().parse_args()
    page, folder = Path(given.page), Path(given.folder)
    if not page.is_file():
        raise UserError(f"{page} does not exist: name a page, such as docs/first-week.md")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: make it, with the data that the page uses")
    added = read_toy(Path(given.toy)) if given.toy else {}
    found = commands(page.read_text(encoding="utf-8"))
    if not found:
        raise UserError(f"{page} has no block fenced as sh, so no command to run")
    here = str(Path(sys.executable).parent)  # `python` is the one that runs this
    env = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}"}
    bash = ["bash", "-c", script(found, added, str(page))]
    return subprocess.run(bash, cwd=folder, env=env).returncode


def read_toy(path: Path) -> dict[str, str]:
    """The flags to add, by the path of the script."""
    try:
        added = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(added, dict) or not all(isinstance(flags, str) for flags in added.values()):
        raise UserError(f'{path} must hold lines such as "scripts/finetune.py": "--steps 20"')
    return added


def commands(text: str) -> list[tuple[int, str]]:
    """The commands of a page with their line numbers; continued lines are one command.

    :raises UserError: if a block, or the last line of one, does not end.
    """
    found: list[tuple[int, str]] = []
    fence, runs, pending = "", False, False
    for number, line in enumerate(text.splitlines(), 1):
        if not fence and line.startswith(FENCE):
            fence, runs = line, line == f"{FENCE}sh"
        elif fence and line.startswith(FENCE):
            if pending:
                raise UserError(f"line {number - 1} ends with a backslash, and the block with it")
            fence, runs = "", False
        elif runs and pending:
            first, begun = found[-1]
            found[-1] = (first, f"{begun}\n{line}")
            pending = line.endswith("\\")
        elif runs and line.strip() and not line.startswith("#"):
            found.append((number, line))
            pending = line.endswith("\\")
    if fence:
        raise UserError(f"the last block ({fence}) does not end")
    return found


def script(found: list[tuple[int, str]], added: dict[str, str], page: str) -> str:
    """What bash runs: every command, printed before, and flags added to those of `added`."""
    cases = "".join(
        f"        {name}) set -- \"$@\" {flags}; echo '  with' {shlex.quote(flags)} ;;\n"
        for name, flags in added.items()
    )
    lines = [
        "set -euo pipefail",
        "trap 'code=$?; [ $code = 0 ] || echo"
        f' "error: {page}, line $line: exit code $code" >&2; exit $code\' EXIT',
        'python() {\n    case "${1:-}" in\n' + cases + '    esac\n    command python "$@"\n}',
    ]
    for number, text in found:
        lines += [f"line={number}", f"printf '\\n$ %s\\n' {shlex.quote(text)}", text]
        lines += ['echo "  ($SECONDS s)"']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command(main)()
