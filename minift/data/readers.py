"""Files -> records. The content decides how a file is read; the name decides only where the content does not.

Every error says file and line. The memory that a file costs is bounded in lines.py and json_rows.py.
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
    """The user's word on how a file is to be read, where the content does not say it."""

    encoding: str = "utf-8"
    delimiter: str | None = None
    columns: str | None = None


def read_records(path: Path, format: FileFormat) -> tuple[Iterator[Record], str]:
    """The records of a file in their order, and how the file was read, if that is worth a note.

    A problem of one row is told in its record. Raises UserError for a file that cannot be read.
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
    readers = {"json lines": read_json_lines, "json document": read_json_document, "bars": _read_bars,
               "text": _read_text}  # fmt: skip
    return readers[kind](path, encoding), ""


def _find_kind(path: Path, start: str, format: FileFormat) -> str:
    name = path.name.lower().removesuffix(".gz")
    suffix = os.path.splitext(name)[1]
    if format.columns is not None or format.delimiter is not None:
        return "separated"
    if suffix in JSON_SUFFIXES or re.match(r'\s*(\{\s*"|\[\s*\{)', start):
        return "json document" if _is_document(start, suffix) else "json lines"
    if suffix in SEPARATED_SUFFIXES or start[:4].lower() == "sep=" or _has_tabs(start):
        return "separated"
    if suffix in TEXT_SUFFIXES:
        first_line = start.lstrip().partition("\n")[0]
        return "bars" if "||" in first_line else "text"
    raise UserError(f"{path}: unknown kind of file {suffix!r:.20}, and its content is not JSON; known are "
                    f"{' '.join(SUFFIXES)}, packed with gzip or not: rename the file, or give --delimiter")


def _has_tabs(start: str) -> bool:
    """A table although its name does not say so: the first lines have as many tabs each."""
    lines = [line for line in start.split("\n")[:6] if line.strip()][:5]
    counts = {line.count("\t") for line in lines}
    return len(lines) > 1 and len(counts) == 1 and 0 not in counts and not lines[0].startswith("\t")


def _is_document(start: str, suffix: str) -> bool:
    """Whether a JSON file is one document over several lines, rather than a value on each line."""
    text = start.lstrip()
    first, line_end, rest = text.partition("\n")
    if not line_end and len(start) == SAMPLE:
        return suffix == ".json" or text.startswith("[")  # a long first line: a document may be this long
    if text.startswith("{"):
        return first.rstrip().endswith(("{", "[", ",", ":"))
    if text.startswith("["):
        try:
            values = parse_json(first)
        except ValueError:
            return True
        holds_rows = suffix == ".json" or any(isinstance(value, dict) for value in values)
        return holds_rows and not rest.strip()
    return suffix == ".json"


def _read_bars(path: Path, encoding: str) -> Iterator[Record]:
    """`mr||ref`, the text format of the E2E challenge: the first || of a line parts prompt and completion."""
    for number, text, problem in read_lines(path, encoding):
        mr, bars, ref = text.partition("||")
        if text.strip() and not bars:
            problem = "no || between prompt and completion"
        if problem or text.strip():
            fields = {} if problem else {"mr": mr, "ref": ref.rstrip("\r\n")}
            yield Record(f"{path.name}:{number}", fields, problem)


def _read_text(path: Path, encoding: str) -> Iterator[Record]:
    """A text without pairs: one document, or several with <|endoftext|> between them. The line ends beside
    that mark belong to the mark, all other white space to the documents."""
    lines = []
    for number, text, problem in read_lines(path, encoding):
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        lines.append(text)
    documents = "".join(lines).split(END_OF_DOCUMENT)
    number = 1
    for document in documents:
        text = document.strip("\r\n") if len(documents) > 1 else document
        if text.strip():
            blank_lines = document[: document.index(text)].count("\n")
            yield Record(f"{path.name}:{number + blank_lines}", {"text": text})
        number += document.count("\n")
