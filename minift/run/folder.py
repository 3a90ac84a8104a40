"""A run's folder: what a run was asked and how it went. minift/checkpoint.py writes its tensor files.

    config.json         every option with its value and where it came from
    metrics.jsonl       one line a step, and the validation loss where it was measured
    result.json         the scores at the end
    lock                held while a process works in the folder
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from minift import distributed as parallel
from minift.errors import UserError


def is_run(folder: Path) -> bool:
    """Whether train.py made the folder. A model's folder has a config.json too, which must
    not get it deleted."""
    try:
        origins = "origins" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        origins = False
    return origins or (folder / "compare.json").is_file()


@contextlib.contextmanager
def open_folder(folder: Path, overwrite: bool, resume: bool) -> Iterator[None]:
    """A folder for a run, locked while in use: new, or emptied when `overwrite`, or as it is when `resume`. A
    new one in which nothing was saved is removed again. Of several processes rank 0 alone has it.

    Raises UserError when it is there already, is not a run's, or another process works in it.
    """
    if not parallel.FIRST:
        yield
        return
    halves = [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]  # what a crash left half written
    new, there = not folder.exists(), list(folder.iterdir()) if folder.is_dir() else []
    old = [path for path in there if path.name != "lock" and path not in halves]
    if old and not resume and not overwrite:
        raise UserError(f"{folder} exists already: name another --out, or pass --overwrite to replace it")
    if old and not is_run(folder):
        raise UserError(f"{folder} is not a run's folder, and is left alone: name another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}; name another --out") from None
    with file:
        lock(file, folder)
        for path in halves if resume else halves + old:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            if new and not any(folder.rglob("*.safetensors")):  # it failed before there was a run
                shutil.rmtree(folder, ignore_errors=True)
            raise


def lock(file: TextIO, folder: Path) -> None:
    """Hold the file until it is closed, or the process ends in whatever way."""
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder} is in use by another run: wait for it, or name another --out") from None


class StopSignals:
    """While it is entered, the first Ctrl-C or SIGTERM is only noted in `received`, for the loop to finish
    its step and save; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def next_free(stem: Path) -> Path:
    """runs/lora-1, runs/lora-2, ...: the first that is not there."""
    number = 1
    while (folder := stem.with_name(f"{stem.name}-{number}")).exists():
        number += 1
    return folder


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it. Rank 0 alone writes. Raises UserError when
    it cannot be written."""
    if not parallel.FIRST:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}; what was saved before is still "
                        "there") from None


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


class MetricsLog:
    """metrics.jsonl, a line at a time, from rank 0 alone. Opened at step n, it drops the lines after n: those
    steps will be run again."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl" if parallel.FIRST else Path(os.devnull)
        old = read_metrics(folder) if step and parallel.FIRST else []
        kept = [line for line in old if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; make room there, then "
                            f"--resume {self.path.parent} goes on from the last checkpoint") from None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # `write` has reported it
            self.file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a crash is left out. UserError: it is damaged."""
    path, found = folder / "metrics.jsonl", []
    try:
        for text in path.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):
                line = json.loads(text)
                if not isinstance(line["step"], int):
                    raise ValueError("step is no number")
                found.append(line)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}:{len(found) + 1} cannot be read ({type(error).__name__}: {error}): put an "
                        "empty file in its place to go on without the old lines") from None
    return found
