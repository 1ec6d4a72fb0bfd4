"""Libraries that only some formats need."""

import importlib
from types import ModuleType

from guided_diffusion.runtime.errors import UserError


def need(module: str, package: str, what: str) -> ModuleType:
    """Import an optional library.

    :param package: that holds it.
    :param what: needs it, for the message.
    :raises UserError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {package}: pip install '.[annotations]' in the checkout"
        ) from error
