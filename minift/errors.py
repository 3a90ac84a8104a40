"""The one exception that stands for a mistake of the person at the keyboard, and how a script ends on it."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line. Everything else that is raised is a bug."""


@contextlib.contextmanager
def tokenizer_faults(where: str) -> Iterator[None]:
    """Turns all that the tokenizers package raises into a UserError. A panic of its Rust code is no Exception
    and prints itself first, so standard error leads nowhere meanwhile."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def out_of_memory(error: Exception) -> bool:
    """MemoryError, or torch's: a class of its own for a GPU's memory, a RuntimeError for the CPU's."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)`. A UserError, or too little memory, becomes one line on stderr and exit code 2
    (`--debug` shows the traceback); Ctrl-C exits with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack a character of someone's data
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    try:
        if re.search("[\ud800-\udfff]", " ".join(arguments)):  # how Python passes on other bytes
            raise UserError("the command line is not valid UTF-8: type it again in UTF-8")
        main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        remedy = ("" if isinstance(error, UserError) else
                  "out of memory; lower --batch, --max-length or the sizes of the mode: ")
        line = "".join(c if c.isprintable() else " " for c in remedy + str(error))
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
