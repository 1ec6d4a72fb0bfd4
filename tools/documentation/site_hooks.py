"""MkDocs' hooks: pages from outside docs/ join the site, and links between the two are changed.

On the site README.md is the front page, and files that are no pages, such as flags/unet.sh, are
copied below files/. An entry of the navigation that names a folder stands for its pages; pages that
no entry names come last.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# pages outside docs/, by their address on the site
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
}
# the target of a link or picture in Markdown
_TARGET = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)\s#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation."""
    docs = Path(config["docs_dir"])
    nav = [_unfolded(entry, docs) for entry in config["nav"]]
    listed = set(_pages(nav))
    rest = [page for page in _below(docs, docs) if page not in listed]
    config["nav"] = [*nav, *([{"More": rest}] if rest else [])]
    return config


def _unfolded(entry: Any, docs: Path) -> Any:
    if isinstance(entry, dict):
        return {title: _unfolded(inner, docs) for title, inner in entry.items()}
    if isinstance(entry, list):
        parts = [_unfolded(inner, docs) for inner in entry]
        return [one for part in parts for one in (part if isinstance(part, list) else [part])]
    return _below(docs / entry, docs) if (docs / entry).is_dir() else entry


def _below(folder: Path, docs: Path) -> list[str]:
    """The pages below a folder: index.md first, then by name."""
    pages = sorted(folder.rglob("*.md"), key=lambda page: (page.name != "index.md", str(page)))
    return [page.relative_to(docs).as_posix() for page in pages]


def _pages(entry: Any) -> Iterator[str]:
    """The addresses in a navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(inner)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the files to which pages link."""
    root = Path(config["docs_dir"]).parent
    sources = {target: root / source for source, target in PAGES.items()}
    sources |= {file.src_uri: file.abs_src_path for file in files.documentation_pages()}
    for address, path in sources.items():
        source = posixpath.relpath(Path(path).as_posix(), root.as_posix())
        text = Path(path).read_text(encoding="utf-8")
        if source in PAGES:
            files.append(File.generated(config, address, content=relinked(text, source)))
        for target in _outside(text, source):
            if (root / target).is_file() and files.get_file_from_path(f"files/{target}") is None:
                copied = (root / target).read_bytes()
                files.append(File.generated(config, f"files/{target}", content=copied))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change the links of a page in docs/ that lead out of it."""
    source = f"docs/{page.file.src_uri}"
    return markdown if page.file.generated_by else relinked(markdown, source)


def _outside(text: str, source: str) -> set[str]:
    """Files outside docs/, no pages, to which a page links; from the repository's root."""
    found = {_from_root(target, source) for target in _TARGET.findall(text)}
    return {path for path in found if not path.startswith(("docs/", "..")) and path not in PAGES}


def _from_root(target: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _address(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path.startswith("docs/"):
        return path[len("docs/") :]
    return PAGES.get(path, f"files/{path}")


def relinked(text: str, source: str) -> str:
    """A page of the repository with its links as they are on the site.

    :param source: the page's path from the repository's root.
    """
    folder = posixpath.dirname(_address(source))

    def change(match: re.Match) -> str:
        path = _from_root(match[1], source)
        return (
            match[1] if path.startswith("..") else posixpath.relpath(_address(path), folder or ".")
        )

    return _TARGET.sub(change, text)
