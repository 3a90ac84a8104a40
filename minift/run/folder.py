"""A run's folder, and the files in it that are not tensors (those are minift/files/checkpoint.py's).

    config.json         every option with its value and its origin
    metrics.jsonl       one line for each step, and one for each validation
    trials.jsonl        one line for each trial of a search
    result.json         the scores at the end
    lock                held while a process works in the folder

A comparison's folder has a run's folder for each mode, and compare.json and compare.md.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from minift.distributed import broadcast, explain_lost_rank, is_main
from minift.errors import UserError
from minift.files.atomic import read_json, read_json_lines, write_text
from minift.files.checkpoint import TUNED, read

COMPARE, TRIALS = "compare.json", "trials.jsonl"
# A result.json without these names cannot be compared; all others may be absent. Each but mode is a number or null.
NEEDED = {
    "mode", "learning_rate", "trainable_parameters", "trainable_share", "peak_memory_bytes", "predicted_peak_bytes",
    "tokens_per_second", "tuned_bytes", "best_val_loss", "test_loss", "rougeL", "exact_match", "forgetting",
    "base_test_loss", "base_rougeL", "best_step", "steps",
}  # fmt: skip


def is_run(folder: Path) -> bool:
    """Whether train.py made the folder: a model's folder also has a config.json, and must not be deleted."""
    if (folder / COMPARE).is_file():
        return True
    try:
        return "origins" in read_json(folder / "config.json", dict)
    except UserError:
        return False


@contextlib.contextmanager
def open_folder(folder: Path, overwrite: bool, resume: bool) -> Iterator[None]:
    """A folder for a run, locked while in use: new, or emptied with `overwrite`, or unchanged with `resume`. A new one
    in which nothing was saved is removed again. Only rank 0 opens it.

    Raises UserError when it exists already, is not a run's, or another process works in it.
    """
    remedy = f"{folder} is intact, and train.py --resume {folder} continues from its last.safetensors"
    with explain_lost_rank(remedy), open_on_rank0(folder, overwrite, resume):
        yield


@contextlib.contextmanager
def open_on_rank0(folder: Path, overwrite: bool, resume: bool) -> Iterator[None]:
    if not is_main():
        yield
        return
    leftover_tmp = [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]  # half-written files after a crash
    is_new = not folder.exists()
    present = list(folder.iterdir()) if folder.is_dir() else []
    old = [path for path in present if path.name != "lock" and path not in leftover_tmp]
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
        for path in leftover_tmp if resume else leftover_tmp + old:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            if is_new and not any(folder.rglob("*.safetensors")):  # it failed before there was anything to resume
                shutil.rmtree(folder, ignore_errors=True)
            raise


def lock(file: TextIO, folder: Path) -> None:
    """Hold the file until it is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder} is in use by another run: wait for it, or name another --out") from None


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM is only noted in `received`, so that the loop can finish its step
    and save; a second one ends the process at once."""

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


def choose_folder(out: str | None, mode_arg: str) -> Path:
    """--out, or the first of runs/lora-1, runs/lora-2, ... that does not exist; on every rank the same."""
    if out is not None:
        return Path(out)

    def next_free() -> Path:
        number, name = 1, mode_arg.replace(",", "-")
        while (folder := Path("runs") / f"{name}-{number}").exists():
            number += 1
        return folder

    return broadcast(next_free)


def check_outside(folder: Path, inputs: dict[str, str | None]) -> None:
    """Raises UserError if one of the inputs, {flag: path}, is in the folder of a run, which --overwrite empties."""
    for name, path in inputs.items():
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{name} {path} is in --out {folder}, which --overwrite empties: name another --out")


class MetricsLog:
    """metrics.jsonl, written line by line by rank 0. Opened at step n, it drops the lines after n: those steps will
    run again."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl" if is_main() else Path(os.devnull)
        old = read_metrics(folder) if step and is_main() else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in old if line["step"] <= step))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; free disk space, then "
                            f"--resume {self.path.parent} continues from the last checkpoint") from None

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
                    raise ValueError("step is not an integer")
                found.append(line)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}:{len(found) + 1} cannot be read ({type(error).__name__}: {error}): put an "
                        "empty file in its place to continue without the old lines") from None
    return found


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The lines of trials.jsonl; none without that file. Raises UserError if it is damaged."""
    path = folder / TRIALS
    if not path.exists():
        return []
    try:
        lines = read_json_lines(path)
        if any(not {"options", "val_loss", "chosen"} <= line.keys() for line in lines):
            raise UserError("a name is missing")
    except UserError as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to repeat the trials") from None
    return lines


def load_result(folder: Path) -> dict[str, Any]:
    """The result.json of a run. Raises UserError if it is damaged or lacks a name."""
    path = folder / "result.json"
    result = read_json(path, dict)
    if missing := NEEDED - result.keys():
        raise UserError(f"{path} cannot be used: {', '.join(sorted(missing))} missing; leave this run out")
    for name in sorted(NEEDED - {"mode"}):
        if not isinstance(result[name], int | float | None):
            raise UserError(f"{path} cannot be used: {name} is not a number; leave this run out")
    return result


def finished(folder: Path) -> dict[str, Any] | None:
    """The content of result.json, if the run has ended, and it and the tuned file are intact."""
    def read_result() -> dict[str, Any] | None:
        try:
            read(folder / TUNED)
            return load_result(folder)
        except UserError:
            return None

    return broadcast(read_result)
