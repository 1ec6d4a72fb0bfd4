"""For the API's pages: a field of a configuration has the default and the help text of its flag."""

import ast
from typing import Any

from griffe import Attribute, Docstring, ExprCall, Extension


class FlagFields(Extension):
    """`lr: float = flag(1e-4, "learning rate")` is shown as `lr = 1e-4`, "Learning rate."."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **_: Any) -> None:
        """Change the field that was just read."""
        value = attr.value
        if isinstance(value, ExprCall) and str(value.function) == "flag":
            attr.value = value.arguments[0]
            text = _text(node.value.args[1])
            attr.docstring = Docstring(f"{text[:1].upper()}{text[1:]}.", parent=attr)


def _text(node: ast.expr) -> str:
    """A text of the sources; values that it is formatted with by their names."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node).strip("{}")
