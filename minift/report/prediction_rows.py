"""The files of eval.py --predict: rows without completions, and the same rows with their predictions."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minift.data.dataset import DataOptions
from minift.data.layouts import AnyLayout, TextLayout, choose_layout
from minift.data.pairs import Prompt, first_fields, read_prompts
from minift.data.records import to_json
from minift.errors import UserError

MAX_PREDICTION_BYTES = 2**20  # far more than a model's positions can hold; a longer line is no prediction


@dataclass(frozen=True)
class NewRows:
    """The rows of a file without completions. Each iteration reads the file again: it may be larger than the memory."""

    path: Path
    data: DataOptions
    layout: AnyLayout
    prediction_field: str

    def __iter__(self) -> Iterator[Prompt]:
        return read_prompts(self.path, self.data.pair_options, self.data.format, self.layout)

    def line_start(self, prompt: Prompt) -> bytes:
        """A row's line in --out up to its prediction, which is the last field. Raises ValueError."""
        line = to_json({**prompt.fields, self.prediction_field: ""})
        # half of a surrogate pair has no bytes in UTF-8; backslashreplace writes it as JSON does, \udc00
        return line.removesuffix('""}').encode("utf-8", errors="backslashreplace")

    def line(self, prompt: Prompt, prediction: str) -> bytes:
        return self.line_start(prompt) + to_json(prediction).encode("utf-8") + b"}\n"

    def check(self) -> int:
        """The number of rows. Raises UserError for the first one that cannot be used."""
        count = 0
        for prompt in self:
            count += 1
            where = self.path.with_name(prompt.where)
            if self.prediction_field in prompt.fields:
                raise UserError(f"{where}: the row has a field {self.prediction_field!r:.40} already: choose another "
                                "name with --prediction-field")
            try:
                self.line_start(prompt)
            except ValueError as error:
                raise UserError(f"{where}: {error}: mend or remove the row") from None
        return count


@contextlib.contextmanager
def open_input(name: str) -> Iterator[Path]:
    """The file of --predict. Standard input is copied to a temporary file, since rows are read several times.

    Raises UserError.
    """
    if name != "-":
        if not os.path.isfile(name):
            raise UserError(f"--predict {name}: no such file; - reads standard input")
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard input"
        try:
            with open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        except OSError as error:
            raise UserError(f"--predict -: cannot be copied to {folder}: {error.strerror or error}") from None
        try:
            yield path
        except UserError as error:  # the name of a temporary folder tells the user nothing
            raise UserError(str(error).replace(f"{folder}/", "")) from None


def find_layout(path: Path, data: DataOptions, run_layout: AnyLayout | None) -> AnyLayout:
    """The run's layout if the first row has its fields, else a layout that fits the row. Raises UserError."""
    layout, fields = run_layout, first_fields(path, data.format)
    if layout is None or not all(name in fields for name in layout.needed):
        layout = choose_layout(path, fields, data.pair_options, with_completion=False)
    if isinstance(layout, TextLayout):
        raise UserError(f"{path}: rows of text alone, field {layout.name!r:.40}, have no prompt to answer: give "
                        "--prompt-field if that field is a prompt, or continue one text with --prompt TEXT")
    return layout


@contextlib.contextmanager
def open_output(name: str | None, rows: NewRows) -> Iterator[tuple[BinaryIO, int]]:
    """The file to write to, positioned after the rows that it holds already, and their number.

    Raises UserError for a file that holds anything else.
    """
    if name in (None, "-"):
        yield sys.stdout.buffer, 0
        return
    path = Path(name)
    if path.exists() and path.samefile(rows.path):
        raise UserError(f"--out {path} is the file of --predict: name another")
    done, size = count_done(path, rows) if path.is_file() else (0, 0)
    file = open(path, "r+b" if path.is_file() else "wb")
    with file:
        if path.is_file():
            file.truncate(size)  # drops a half-written line
            file.seek(size)
        yield file, done


def count_done(path: Path, rows: NewRows) -> tuple[int, int]:
    """The number of rows that a file has with their predictions, and the bytes that they take.

    A last line that was only half written does not count. Raises UserError for a line of anything else.
    """
    done = size = 0
    with open(path, "rb") as file:
        for prompt in rows:
            start = rows.line_start(prompt)
            limit = len(start) + MAX_PREDICTION_BYTES
            line = file.readline(limit)
            if line.startswith(start) and line.endswith(b'"}\n'):
                done += 1
                size += len(line)
                continue
            # cut before the prediction, or within it
            half_written = not line.endswith(b"\n") and len(line) < limit
            if half_written and (line.startswith(start) or start.startswith(line)):
                return done, size
            raise UserError(f"{path}:{done + 1}: this is not {prompt.where} with its prediction: name another --out, "
                            "or give the rows that the file was begun with")
        if file.read(1):
            raise UserError(f"{path} has more rows than {rows.path}: name another --out")
    return done, size
