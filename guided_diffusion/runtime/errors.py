"""Errors that users can cause end in one clear line and exit code 2, never in a traceback."""

import functools
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """An error the user can fix. Its message is one line: what is wrong, where, with which values,
    and what to do."""


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wrap the `main` of a script: a UserError becomes one line on stderr and exit code 2.

    :param main: returns the exit code, or None for 0.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            code = main()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            sys.exit(EXIT_USER_ERROR)
        sys.exit(code or 0)

    return run
