"""Files of flags, for `--config`: YAML or JSON, or the config.json of a run.

A file names flags as the command line does, with underscores or hyphens. It may be for several
commands: flags then stand in SECTIONS, of which a command reads those that its configurations
name, and in them passes over the flags of its kin. In a user's file everything else must be a flag
of the command. The config.json of a run holds more than flags, which is passed over.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.storage.files import read_text
from guided_diffusion.runtime.text import one_line

# of the files; see SECTION of the configurations
SECTIONS = (
    *("model", "diffusion", "reading", "train", "sample", "finetune", "baseline"),
    *("predict", "evaluate"),
)
# the sections of a run's config.json that hold flags
_OF_RUNS = {"model": "model", "diffusion": "diffusion", "reading": "reading", "training": "train"}
# how a run was started, which is no property of it
_OF_A_START = ("resume_checkpoint", "dry_run")
# a boolean, as the command line spells it
_WORDS = {True: "True", False: "False"}


def read(
    path: str,
    known: Collection[str],
    sections: Mapping[str, Collection[str]],
    ignored: Collection[str],
    suggest: Callable[[str], str],
) -> Iterator[tuple[str, list[str]]]:
    """The flags in a file and their values, as texts of the command line.

    :param known: names of the command's flags.
    :param sections: those that the command reads, and the names that stand in them beside `known`.
    :param ignored: flags that the command takes and ignores; it does not take them from the
        config.json of a run.
    :param suggest: what to say of an unknown flag, such as "; did you mean --lr?".
    :raises UserError: for a file that cannot be read, and for what is no flag of the command.
    """
    content = _load(path)
    own = isinstance(content.get("kind"), str) and isinstance(content.get("reading"), Mapping)
    seen: set[str] = set()
    for section, title, entries in _parts(path, content, own):
        if section and section not in sections:
            continue
        for key, value in entries.items():
            name = str(key).replace("-", "_")
            if name in _OF_A_START and own:
                continue
            if name not in known or (own and name in ignored):
                if not own and name not in sections.get(section, ()):
                    raise UserError(f"{path}: {title}{key} is no flag here{suggest(f'--{key}')}")
                continue
            if name in seen and not own:
                raise UserError(f"{path}: {key} stands there twice: keep one")
            seen.add(name)
            if (texts := _texts(value, f"{path}: {key}")) is not None:
                yield name, texts


def _parts(
    path: str, content: Mapping[str, Any], own: bool
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The sections of a file, "" of flags outside any; their titles for messages; their flags."""
    flat = {}
    for key, value in content.items():
        if own:
            if key in _OF_RUNS and isinstance(value, Mapping):
                yield _OF_RUNS[key], "", value
        elif isinstance(value, Mapping):
            if key not in SECTIONS:
                raise UserError(f"{path}: {key} is no section: they are {', '.join(SECTIONS)}")
            yield key, f"{key}: ", value
        elif key in SECTIONS and value is None:
            continue
        else:
            flat[key] = value
    yield "", "", flat


def _texts(value: Any, place: str) -> list[str] | None:
    """A value as the command line spells it; None for null, which leaves the flag out."""
    if value is None:
        return None
    if isinstance(value, list):
        if any(isinstance(one, list | dict) for one in value):
            raise UserError(f"{place} is a list of lists: write a list of values")
        return [_WORDS[one] if isinstance(one, bool) else str(one) for one in value]
    if isinstance(value, Mapping):
        raise UserError(f"{place} holds names of its own: write a value or a list")
    return [_WORDS[value] if isinstance(value, bool) else str(value)]


def _load(path: str) -> dict[str, Any]:
    """:raises UserError: unless it is a file of values by name."""
    text = read_text(path, "--config")
    try:
        content = _json(text) if path.endswith(".json") else _yaml(text)
    except ValueError as error:
        raise UserError(f"--config {path} cannot be read: {one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path} does not hold flags by name, such as lr: 1e-4")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """:raises ValueError: if a name stands there twice."""
    found = dict(pairs)
    for name, _ in pairs if len(found) < len(pairs) else ():
        if [other for other, _ in pairs].count(name) > 1:
            raise ValueError(f"{name} stands there twice: keep one")
    return found


def _json(text: str) -> Any:
    """Numbers stay as they are written."""
    return json.loads(text, parse_float=str, parse_int=str, object_pairs_hook=_unique)


def _yaml(text: str) -> Any:
    """Texts and numbers stay as they are written: 1e-4 is a text in YAML, and 1:2 a number.

    :raises ValueError: if it is no YAML.
    """
    import yaml  # not needed without --config

    class Loader(yaml.SafeLoader):
        """Knows null, but neither numbers nor dates nor booleans."""

        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
            first: [(tag, words) for tag, words in found if tag.endswith((":null", ":merge"))]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            _unique([(key.value, None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
