"""Every relative link and picture of the documents leads to a file, and to a heading in it."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from paths import ROOT


def slug(heading: str) -> str:
    """The anchor that repositories' pages and the site give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def read(text: str) -> tuple[list[tuple[int, str]], set[str]]:
    """The targets of a page, each with its line, and the anchors of its headings."""
    targets, anchors = [], set()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens):
        if token.type != "inline":
            continue
        line = token.map[0] + 1
        for child in token.children:
            line += child.type in ("softbreak", "hardbreak")
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                targets.append((line, str(target)))
        if before.type == "heading_open":
            one = slug("".join(child.content for child in token.children))
            numbered = (f"{one}-{n}" for n in range(1, len(anchors) + 2))
            anchors.add(
                one if one not in anchors else next(a for a in numbered if a not in anchors)
            )
    return targets, anchors


def faults_of(page: Path, root: Path) -> list[str]:
    found = []
    for line, target in read(page.read_text())[0]:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        wrong = None
        if not file.is_relative_to(root.resolve()) or path.startswith("/"):
            wrong = "leaves the repository"
        elif not file.exists():
            wrong = "does not exist"
        elif anchor and (file.suffix != ".md" or anchor not in read(file.read_text())[1]):
            wrong = "has no such heading"
        if wrong:
            found.append(f"{page.relative_to(root)}:{line}: {target} {wrong}")
    return found


def test_links_of_the_documents():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert sum(len(read(page.read_text())[0]) for page in pages) > 60
    faults = [fault for page in sorted(pages) for fault in faults_of(page, ROOT)]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("link", "wrong"),
    [
        ("[a](other.md)", None),
        ("[a](other.md#one--two)", None),
        ("[a](other.md#one-two)", "has no such heading"),
        ("[a](#the-page-with-code)", None),
        ("[a](#a-page)", "has no such heading"),
        ("[a](others.md)", "does not exist"),
        ("![a](picture.png)", "does not exist"),
        ("[a](../../other.md)", "leaves the repository"),
        ("[a](/other.md)", "leaves the repository"),
        ("[a](https://example.org/others.md)", None),
        ("`[a](others.md)`", None),
    ],
)
def test_a_fault_is_found(tmp_path, link, wrong):
    (tmp_path / "other.md").write_text("# One, & two\n")
    page = tmp_path / "page.md"
    page.write_text(
        f"# The page: with `code`\n\nA line,\nthen {link}.\n\n| a |\n| - |\n| {link} |\n"
    )
    faults = faults_of(page, tmp_path)
    assert [fault.split(": ")[0] for fault in faults] == (
        ["page.md:4", "page.md:8"] if wrong else []
    )
    assert all(fault.endswith(wrong) for fault in faults)
