"""What a user can cause ends with one clear line and exit code 2, never with a traceback."""

import functools
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, where, values, what to do."""


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wrap the `main` of a script: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run() -> None:
        try:
            code = main()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            sys.exit(EXIT_USER_ERROR)
        sys.exit(code or 0)

    return run
