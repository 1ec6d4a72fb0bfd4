"""Command lines, names and links in Markdown, docstrings and shell files, each with its place.

How documents write command lines:

- a code block holds commands as a shell reads them, with comments and continued lines; of
  variables, those of the `flags/*.sh` that the document sources last are known (flags/unet.sh
  before any), and those that a shell file sets itself; others stand for one word
- `[...]` may be left out, and `[... flags]` stands for further flags
- `A|B` in a word is one or the other, `...` further arguments
- a line of a docstring ends where two spaces follow a word; deeper lines continue it
- code within a line of prose is a mention: without positional arguments it names flags only, and a
  flag may lack its value
"""

import ast
import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from paths import ROOT

_END = {"|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1"}
_SCRIPT = re.compile(r"(?:.*/)?(\w+\.py)")
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\}|(?P<name>\w+))")
_ASSIGNED = re.compile(r"\b([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s;\"'()]+)")
_SOURCED = re.compile(r"^\s*source (flags/\w+\.sh)")
# the flags of a document that sources none
_FIRST = "source flags/unet.sh"


@dataclass(frozen=True)
class Code:
    """A command line in a block, or code within prose.

    file, line: its place. mention: whether it stands in prose. variables: known ones, by name.
    """

    file: str
    line: int
    text: str
    mention: bool = False
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Command:
    """The arguments that a script gets. open: whether further ones are left to the reader."""

    code: Code
    script: str
    arguments: tuple[str, ...]
    open: bool = False


# ---- documents to code ----


def markdown_codes(text: str, file: str) -> list[Code]:
    """Every line of the code blocks, with those that continue it, and every code in prose."""
    found = []
    variables = shell_variables(_FIRST)
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("fence", "code_block"):
            first = token.map[0] + (2 if token.type == "fence" else 1)
            for line, joined in _joined(token.content.splitlines(), first):
                if _SOURCED.match(joined):
                    variables = shell_variables(joined)
                found.append(Code(file, line, joined, variables=variables))
        elif token.type == "inline":
            line = token.map[0] + 1
            for child in token.children:
                if child.type == "code_inline":
                    found.append(Code(file, line, child.content, True, variables))
                line += child.type in ("softbreak", "hardbreak")
                line += child.content.count("\n") if child.type == "code_inline" else 0
    return found


def docstring_codes(source: str, file: str) -> list[Code]:
    """The lines of a script's docstring that run it: `NAME.py ...` or, indented, `python ...`."""
    module = ast.parse(source)
    text = ast.get_docstring(module, clean=False) or ""
    variables = shell_variables(_FIRST)
    own = Path(file).name
    found, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if not (stripped.startswith(f"{own} ") or (indent and stripped.startswith("python "))):
            continue
        for further in lines[number + 1 :]:
            if len(further) - len(further.lstrip()) <= indent:
                break
            stripped += " " + further.strip()
        stripped = re.split(r"(?<=\S) {2,}(?=\S)", stripped)[0]
        found.append(Code(file, module.body[0].lineno + number, stripped, variables=variables))
    return found


def shell_codes(text: str, file: str) -> list[Code]:
    """The lines of a shell file, continued ones joined; it knows the variables that it sets."""
    variables = shell_variables(f"{_FIRST}\n{text}")
    lines = _joined(text.splitlines(), 1)
    return [Code(file, line, joined, variables=variables) for line, joined in lines]


def shell_variables(text: str) -> tuple[tuple[str, str], ...]:
    """What lines assign, `NAME="..."`, or source: of each name the last value."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        sourced = _SOURCED.match(line)
        if sourced and (ROOT / sourced[1]).exists():
            values |= dict(shell_variables((ROOT / sourced[1]).read_text()))
        if not line.lstrip().startswith(("#", "eval")):
            for name, value in _ASSIGNED.findall(line):
                if "$(" not in value and not value.endswith("$"):
                    values[name] = _expanded(value.strip("\"'"), values)
    return tuple(sorted(values.items()))


def _joined(lines: list[str], first: int) -> list[tuple[int, str]]:
    """Lines with those that they continue by a backslash, numbered from `first`."""
    found, begun = [], None
    for number, line in enumerate(lines, first):
        begun = (begun[0], begun[1] + " " + line.strip()) if begun else (number, line.strip())
        if begun[1].endswith("\\"):
            begun = (begun[0], begun[1][:-1].rstrip())
            continue
        found.append(begun)
        begun = None
    return [*found, begun] if begun else found


def _expanded(text: str, values: dict[str, str]) -> str:
    def value(match: re.Match) -> str:
        name = match["braced"] or match["name"]
        return values.get(name, match["default"] or match[0])

    return _VARIABLE.sub(value, text)


# ---- code to commands ----


def commands(code: Code) -> list[Command]:
    """The scripts that a line runs, once for every choice that it leaves.

    :raises ValueError: for quotes that do not close.
    """
    text = re.sub(r"\$\([^()]*\)", "VALUE", _without_comment(code.text))
    if not re.search(r"\w\.py\b", text):
        return []
    text = _expanded(text, dict(code.variables))
    text = re.sub(r"\[[^\[\]]* flags\]", "", text)
    found = []
    for chosen in _with_and_without_brackets(text):
        words = shlex.split(chosen)
        found += [command for one in _simple(words) for command in _alternatives(code, one)]
    return list(dict.fromkeys(found))


def _without_comment(text: str) -> str:
    for match in re.finditer(r"(?:^|\s)#", text):
        before = text[: match.start()]
        if before.count('"') % 2 == 0 and before.count("'") % 2 == 0:
            return before
    return text


def _with_and_without_brackets(text: str) -> list[str]:
    """`a [b] [c]` as `a` and `a b c`; brackets within words, as in `'.[mpi]'`, stay."""
    brackets = re.compile(r"(?<!\S)\[([^\[\]]*)\](?!\S)")
    return [brackets.sub("", text), brackets.sub(r"\1", text)] if brackets.search(text) else [text]


def _simple(words: list[str]) -> list[list[str]]:
    """The words of each command of a line, without redirections."""
    found: list[list[str]] = [[]]
    for word in words:
        if word in _END:
            found.append([])
            continue
        found[-1].append(word.rstrip(";"))
        if word.endswith(";"):
            found.append([])
    return found


def _alternatives(code: Code, words: list[str]) -> list[Command]:
    at = next((i for i, word in enumerate(words) if _SCRIPT.fullmatch(word)), None)
    if at is None or (code.mention and (at > 1 or (at == 1 and words[0] != "python"))):
        return []
    script, arguments = words[at], words[at + 1 :]
    left = [word for word in arguments if word != "..."]
    choices = [word.split("|") if re.fullmatch(r"[\w.|-]+", word) else [word] for word in left]
    is_open = len(left) < len(arguments)
    return [Command(code, script, one, is_open) for one in itertools.product(*choices)]


# ---- documents of the project ----


def documents() -> list[Path]:
    """Pages that people write; docs/reference/ is made of the parsers."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(page for page in pages if "reference" not in page.relative_to(ROOT).parts)


def project_codes() -> list[Code]:
    """All code in the project's documents, docstrings of commands and shell files."""
    found = []
    for page in documents():
        found += markdown_codes(page.read_text(), str(page.relative_to(ROOT)))
    for folder in ("scripts", "tools", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            found += docstring_codes(path.read_text(), str(path.relative_to(ROOT)))
        for path in sorted((ROOT / folder).glob("*.sh")):
            found += shell_codes(path.read_text(), str(path.relative_to(ROOT)))
    return found
