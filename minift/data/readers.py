"""Files -> records. The content decides how a file is read; the name decides only where the content does not.

Every error names file and line. lines.py and json_rows.py bound the memory that a file can take.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minift.data.json_rows import parse_json, read_json_document, read_json_lines
from minift.data.lines import file_errors, find_encoding, open_text, read_lines
from minift.data.records import Record
from minift.data.separated import read_separated
from minift.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
SAMPLE = 2**16  # characters that are read to find out the kind of a file
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SEPARATED_SUFFIXES = (".csv", ".tsv", ".tab", ".psv")
TEXT_SUFFIXES = (".txt", ".text", ".md")
SUFFIXES = JSON_SUFFIXES + SEPARATED_SUFFIXES + TEXT_SUFFIXES


@dataclass(frozen=True)
class FileFormat:
    """How the user says a file must be read; None: the content decides."""

    encoding: str = "utf-8"
    delimiter: str | None = None
    columns: str | None = None


def read_records(path: Path, format: FileFormat) -> tuple[Iterator[Record], str]:
    """The records of a file in their order, and a note on a table's dialect if it is unusual, else "".

    A row that cannot be read gives a record with a problem. Raises UserError for a file that cannot be read.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a' if os.path.exists(path) else 'no such'} file, give --data another")
    with file_errors(path):
        encoding = find_encoding(path, format.encoding)
        with open_text(path, encoding) as file:
            start = file.read(SAMPLE)
    kind = _find_kind(path, start, format)
    if kind == "separated":
        return read_separated(path, read_lines(path, encoding), format.delimiter, format.columns)
    readers = {
        "json lines": read_json_lines,
        "json document": read_json_document,
        "bars": _read_bars,
        "text": _read_text,
    }
    return readers[kind](path, encoding), ""


# ---- the kind of a file


def _find_kind(path: Path, start: str, format: FileFormat) -> str:
    """The kind of a file from its first characters `start`: a key of the readers above, or "separated"."""
    name = path.name.lower().removesuffix(".gz")
    suffix = os.path.splitext(name)[1]
    if format.columns is not None or format.delimiter is not None:
        return "separated"
    # `{"`, or `[{`: a text or a table may begin with a single brace or bracket
    if suffix in JSON_SUFFIXES or re.match(r'\s*(\{\s*"|\[\s*\{)', start):
        return "json document" if _is_document(start, suffix) else "json lines"
    # files named .txt are often tables of tabs
    if suffix in SEPARATED_SUFFIXES or start[:4].lower() == "sep=" or _has_tabs(start):
        return "separated"
    if suffix in TEXT_SUFFIXES:
        first_line = start.lstrip().partition("\n")[0]
        return "bars" if "||" in first_line else "text"
    raise UserError(f"{path}: unknown kind of file {suffix!r:.20}, and its content is not JSON; known are "
                    f"{' '.join(SUFFIXES)}, packed with gzip or not: rename the file, or give --delimiter")


def _has_tabs(start: str) -> bool:
    """Whether the first lines have the same number of tabs each, so that they are rows of a table."""
    lines = [line for line in start.split("\n")[:6] if line.strip()][:5]
    counts = {line.count("\t") for line in lines}
    is_indented = bool(lines) and lines[0].startswith("\t")  # text, not a table
    return len(lines) > 1 and len(counts) == 1 and 0 not in counts and not is_indented


def _is_document(start: str, suffix: str) -> bool:
    """Whether a JSON file is one document, as opposed to a value on each line."""
    text = start.lstrip()
    first, line_end, rest = text.partition("\n")
    if not line_end and len(start) == SAMPLE:
        return suffix == ".json" or text.startswith("[")  # the first line is longer than the sample: a guess
    # a pretty-printed object: its first line is not a value
    if text.startswith("{"):
        return first.rstrip().endswith(("{", "[", ",", ":"))
    if text.startswith("["):
        try:
            values = parse_json(first)
        except ValueError:
            return True  # a pretty-printed list
        # a list on each line is no document: with several of them every row is reported as no object
        holds_rows = suffix == ".json" or any(isinstance(value, dict) for value in values)
        return holds_rows and not rest.strip()
    return suffix == ".json"


# ---- kinds of text


def _read_bars(path: Path, encoding: str) -> Iterator[Record]:
    """The text format of the E2E challenge, `mr||ref`: the first || of a line separates prompt and completion."""
    for number, text, problem in read_lines(path, encoding):
        where = f"{path.name}:{number}"
        mr, bars, ref = text.partition("||")
        if problem:
            yield Record(where, {}, problem)
        elif bars:
            yield Record(where, {"mr": mr, "ref": ref.rstrip("\r\n")})
        elif text.strip():
            yield Record(where, {}, "no || between prompt and completion")


def _read_text(path: Path, encoding: str) -> Iterator[Record]:
    """A text without pairs: one document, or several with <|endoftext|> between them.

    Line ends beside that mark are dropped; all other white space belongs to the documents. Raises UserError.
    """
    lines = []
    for number, text, problem in read_lines(path, encoding):
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        lines.append(text)
    documents = "".join(lines).split(END_OF_DOCUMENT)
    number = 1  # of the document's first line
    for document in documents:
        text = document.strip("\r\n") if len(documents) > 1 else document
        if text.strip():
            blank_lines = document[: document.index(text)].count("\n")
            yield Record(f"{path.name}:{number + blank_lines}", {"text": text})
        number += document.count("\n")
