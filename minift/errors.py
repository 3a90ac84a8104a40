"""The one exception that stands for a mistake of the person at the keyboard, and how a script ends on it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line. Everything else that is raised is a bug."""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)`; a UserError becomes one line on stderr and exit code 2 (`--debug` shows the
    traceback)."""
    arguments = sys.argv[1:]
    try:
        main(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        print("error: " + " ".join(str(error).split("\n")), file=sys.stderr)
        sys.exit(2)
