"""Write docs/reference/: every command with its arguments and flags, as its parser has them.

`make reference` runs it; a test compares the pages with the parsers.
"""

import ast
import re
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guided_diffusion.runtime.command_line.commands import Flag, flags_of, parser_of  # noqa: E402
from guided_diffusion.runtime.command_line.help_text import usage  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
MADE = "<!-- made by `make reference`: change the flags, not this page -->\n"
# the commands, in the order of the work
STAGES = {
    "Data": ["prepare_data", "import_labels", "rgb2tif", "export_labels"],
    "Pretraining": ["image_train", "probe"],
    "Segmentation": [
        *["finetune", "baseline_train", "predict", "serve", "evaluate"],
        *["pack_model", "export_onnx"],
    ],
    "Experiments": ["label_efficiency", "simulate_loop"],
    "Samples": ["image_sample", "evaluate_samples", "image_nll"],
    "Images and masks": ["evaluate_guidance", "mask_diffusion_train"],
    "Guidance and super-resolution": [
        *["classifier_train", "classifier_sample", "super_res_train", "super_res_sample"]
    ],
}


def pages() -> dict[str, str]:
    """The text of every page, by its file name."""
    paths = {path.stem: path for path in commands()}
    named = [name for names in STAGES.values() for name in names]
    stages = {**STAGES, "More": sorted(set(paths) - set(named))}
    made = {f"{name}.md": _command(path) for name, path in paths.items()}
    return {"index.md": _index(stages, paths), **made, "benchmarks.md": _benchmarks()}


def commands() -> list[Path]:
    """The scripts that define a parser."""
    found = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "tools").glob("*.py")])
    return [
        path
        for path in found
        if "\ndef parser() -> CommandParser:" in path.read_text(encoding="utf-8")
    ]


def _index(stages: dict[str, list[str]], paths: dict[str, Path]) -> str:
    lines = [
        "# Commands",
        "",
        MADE,
        "Every command with all of its flags. For what all take, such as `--config FILE`,",
        "see [The command line](../command-line.md).",
        "",
    ]
    for title, names in stages.items():
        names = [name for name in names if name in paths]
        if names:
            lines += [f"## {title}", "", "| command | |", "| --- | --- |"]
            lines += [f"| {_link(paths[name])} | {_first(paths[name])} |" for name in names]
            lines.append("")
    lines += ["[Benchmarks](benchmarks.md) have a page of their own.", ""]
    return "\n".join(lines)


def _link(path: Path) -> str:
    return f"[`{path.parent.name}/{path.name}`]({path.stem}.md)"


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _first(path: Path) -> str:
    """The first paragraph of a script's docstring."""
    return _prose(" ".join(_docstring(path).split("\n\n")[0].split()))


def _command(path: Path) -> str:
    parser = parser_of(path)
    flags = flags_of(parser)
    arguments = [flag for flag in flags if flag.positional]
    shown = usage(f"python {path.parent.name}/{path.name}", parser.visible())
    lines = [f"# {path.name}", "", MADE, *_description(path), f"    {shown}", ""]
    if arguments:
        lines += ["## Arguments", "", "| argument | |", "| --- | --- |"]
        lines += [f"| {_code(_metavar(flag))} | {_prose(flag.help)} |" for flag in arguments]
        lines.append("")
    if any(not flag.basic for flag in flags):
        lines += ["Flags in bold are in `--help`, the others in `--help-all`.", ""]
    rest = [flag for flag in flags if not flag.positional]
    for title, group in groupby(rest, key=lambda flag: flag.group):
        lines += [f"## {title[:1].upper()}{title[1:]}", ""]
        lines += ["| flag | default | |", "| --- | --- | --- |"]
        lines += [_row(flag, any(not other.basic for other in flags)) for flag in group]
        lines.append("")
    return "\n".join(lines)


def _description(path: Path) -> list[str]:
    """The docstring: prose, and blocks of the lines that show how to call the command."""
    lines: list[str] = []
    for paragraph in _docstring(path).split("\n\n"):
        shown = paragraph.startswith(f"{path.name} ")
        if shown:
            lines += [f"    {line}" for line in paragraph.splitlines()]
        else:
            lines += [_prose(line) for line in paragraph.splitlines()]
        lines.append("")
    return lines


def _metavar(flag: Flag) -> str:
    return flag.metavar or flag.name.upper()


def _row(flag: Flag, marked: bool) -> str:
    name = f"--{flag.name}"
    spoken = {f"__{flag.name}", *(() if flag.default == "on" else (f"__no_{flag.name}",))}
    underscored = {spelling.replace("-", "_"): spelling for spelling in reversed(flag.spellings)}
    others = [spelling for key, spelling in reversed(underscored.items()) if key not in spoken]
    spelt = ", ".join([_code(f"{name} {flag.metavar}".strip()), *map(_code, others)])
    if marked and flag.basic:
        spelt = f"**{spelt}**"
    text = _prose(flag.help)
    if flag.choices and not all(choice in flag.metavar.split("|") for choice in flag.choices):
        text += f"; one of {', '.join(_code(choice) for choice in flag.choices)}"
    default = "required" if flag.required else flag.default
    return f"| {spelt} | {_prose(default)} | {text} |"


def _code(text: str) -> str:
    """Code in a cell of a table, which a bar would end."""
    return f"<code>{text.replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _prose(text: str) -> str:
    """Text as Markdown: nothing of it is markup, and flags are code."""
    parts = re.split(r"(`[^`]+`|(?<![\w-])--?[A-Za-z][\w-]*)", text)
    escaped = [
        re.sub(r"([*\[\]|\\]|\b_|_\b)", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]
    ]
    found = [part if part.startswith("`") else f"`{part}`" for part in parts[1::2]]
    return "".join(a + b for a, b in zip(escaped, [*found, ""]))


def _benchmarks() -> str:
    lines = [
        "# Benchmarks",
        "",
        MADE,
        "What they measured is in [Speed and memory](../performance.md).",
        "",
    ]
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        first, *others = _docstring(path).split("\n\n")
        usage = next((p for p in others if p.startswith("    python ")), None)
        if usage:
            lines += [f"## {path.name}", "", _prose(" ".join(first.split())), "", usage, ""]
    return "\n".join(lines)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
