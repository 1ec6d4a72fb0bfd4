"""Every public name of the original package is here, with at least its parameters."""

import importlib
import inspect
import json
import re

import pytest
from golden_util import GOLDEN

API = json.loads((GOLDEN / "api.json").read_text())


def parameters(signature: str) -> list[str]:
    """Names in a signature such as "(self, x, *, steps: int = 3)", stars kept off."""
    inner = re.sub(r"\) ->.*$", ")", signature).strip()[1:-1]
    depth, names, current = 0, [], ""
    for char in inner + ",":
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            names.append(current.split(":")[0].split("=")[0].strip())
            current = ""
        else:
            current += char
    return [name.lstrip("*") for name in names if name and name not in ("*", "/")]


def accepts(function, names: list[str]) -> None:
    own = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
        return
    missing = [n for n in names if n not in own and n not in ("args", "kwargs")]
    assert not missing, f"{function} lacks {missing}"


CASES = [(module, name) for module, members in API.items() for name in members]


@pytest.mark.parametrize(("module", "name"), CASES)
def test_the_name_exists_with_its_parameters(module, name):
    expected = API[module][name]
    ours = getattr(importlib.import_module(module), name)
    if isinstance(expected, str):
        accepts(ours, parameters(expected))
        return
    if isinstance(expected["class"], list):
        assert [member.name for member in ours] == expected["class"]
    elif not expected["class"].startswith(("(*args", "()")):
        accepts(ours.__init__, parameters(expected["class"]))
    for method, signature in expected["methods"].items():
        accepts(getattr(ours, method), [n for n in parameters(signature) if n != "self"])


def test_number_of_classes_stays():
    from guided_diffusion.networks.config import NUM_CLASSES

    assert NUM_CLASSES == 1000


def test_the_training_loop_names_the_original_arguments():
    """Not only through `**fields`: editors and readers see them."""
    expected = API["guided_diffusion.train_util"]["TrainLoop"]["class"]
    own = inspect.signature(importlib.import_module("guided_diffusion.train_util").TrainLoop)
    assert set(parameters(expected)) - {"*"} <= set(own.parameters)
