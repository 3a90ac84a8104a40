"""UserError, the exception for a mistake of the user, and how a script ends on it."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator


class UserError(Exception):
    """One line for the user: the problem, its place in a file or an option, and the remedy.

    Every other exception that reaches a script is a bug, and keeps its traceback.
    """


class TrainingFailed(UserError):
    """A training cannot continue with its options, or has changed nothing. A search notes it and tries the others."""


@contextlib.contextmanager
def tokenizer_faults(where: str) -> Iterator[None]:
    """While entered: every exception of the tokenizers package becomes a UserError that begins with `where`."""
    # a panic of the package's Rust code prints its own message, so standard error (2) is closed off for a while;
    # sys.stderr would not do, since Rust writes to the file descriptor
    saved_stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is a BaseException, not an Exception
        message = " ".join(str(error).split())  # on one line
        raise UserError(f"{where}: {message[:200]}") from None
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)
        os.close(devnull)


def out_of_memory(error: Exception) -> bool:
    """Whether Python, or torch on a GPU or a CPU, found too little memory."""
    if isinstance(error, MemoryError):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's for a GPU; compared by name: no import of torch here
        return True
    # torch has no exception class for the CPU's memory
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)`. A UserError, a path that the system refuses, or too little memory becomes one line on
    stderr and exit code 2 (`--debug` shows the traceback); Ctrl-C exits with 130."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal's encoding may lack a character of the data; a test may have replaced the stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a log file shows lines at once
    arguments = sys.argv[1:]
    try:
        # Python represents a byte that is not valid UTF-8 by one of these characters
        if re.search("[\ud800-\udfff]", " ".join(arguments)):
            raise UserError("the command line is not valid UTF-8: type it again in UTF-8")
        main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
    except Exception as error:
        is_path = isinstance(error, OSError) and error.filename is not None
        if not isinstance(error, UserError) and not is_path and not out_of_memory(error):
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        message = str(error)
        if is_path:
            message = f"{error.filename}: {error.strerror}; check the path and its permissions"
        elif not isinstance(error, UserError):
            message = "out of memory; lower --batch, --max-length or the sizes of the mode: " + message
        # one line, and no control characters of a hostile file for the terminal
        line = "".join(c if c.isprintable() else " " for c in message)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
