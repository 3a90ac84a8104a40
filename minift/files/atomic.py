"""The one writer of files, which is atomic: a reader sees the old file or the new one. And the readers of JSON."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from minift.distributed import is_main
from minift.errors import UserError

T = TypeVar("T")

JSON_NAMES = {dict: "an object", list: "a list", str: "a string"}


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace a file by these bytes-like chunks.

    A failure or a crash at any moment leaves the previous file as it was. Of several processes only rank 0 writes.
    Raises UserError for any error of the disk.
    """
    if not is_main():
        return
    # in the same folder, since a file can be renamed only within a file system
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())  # without it a power cut could leave the new name without its bytes
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written: {reason}; a previous file is untouched") from None
    finally:
        with contextlib.suppress(OSError):  # there is none after a success
            temporary.unlink(missing_ok=True)

    # The new name is on the disk once its folder is synced. Windows cannot do that (no O_DIRECTORY), nor can some file
    # systems; after a power cut they have the old file or the new one, both complete.
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text in UTF-8. Raises UserError."""
    write_atomically(path, [text.encode("utf-8")])


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON. Raises UserError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, kind: type[T]) -> T:
    """The value of a JSON file.

    Raises UserError when the file is missing or unreadable, is not JSON, is nested too deeply, or holds
    another kind of value than `kind` (dict or list).
    """
    try:
        if not path.is_file():  # open() would wait on a pipe
            raise UserError(f"{path} is missing")
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # -sig: editors on Windows put a mark in front
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, kind):
        found = JSON_NAMES.get(type(value), f"the value {value!r:.40}")
        raise UserError(f"{path} holds {found}, and must hold {JSON_NAMES[kind]}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one on each line. Raises UserError."""
    found: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for text in file:
                value = json.loads(text)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
                found.append(value)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}:{len(found) + 1} cannot be read as JSON: {error}") from None
    return found
