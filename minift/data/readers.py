"""Files -> records. The content decides how a file is read; the name decides only where the content does not.

Files may be hostile: the limits below bound the memory that they cost, and every error says file and line.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minift.data.records import Line, Record, SourceFloat, kind_of
from minift.data.separated import read_separated
from minift.errors import UserError

MAX_LINE_BYTES = 16 * 2**20  # counted in characters once the line is decoded
MAX_JSON_BYTES = 256 * 2**20  # a JSON document is parsed in memory, and may stand on one line
MAX_UNPACKED_BYTES = 2**30  # a gzip file can be a thousand times larger than it looks
END_OF_DOCUMENT = "<|endoftext|>"
SAMPLE = 2**16  # characters that are read to find out the kind of a file
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SEPARATED_SUFFIXES = (".csv", ".tsv", ".tab", ".psv")
TEXT_SUFFIXES = (".txt", ".text", ".md")
SUFFIXES = JSON_SUFFIXES + SEPARATED_SUFFIXES + TEXT_SUFFIXES
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
PANDAS = 'python -c "import pandas; pandas.{0}({1!r}).to_json({2!r}, orient=\'records\', lines=True)"'
ARROW = 'python -c "import datasets; datasets.Dataset.from_file({1!r}).to_json({2!r})"'
# First bytes of files that are not text: what they are, and the command that converts them.
BINARY_KINDS = (
    (b"PAR1", "Parquet", PANDAS.replace("{0}", "read_parquet")),
    (b"ARROW1", "Arrow", PANDAS.replace("{0}", "read_feather")),
    (b"\xff\xff\xff\xff", "Arrow", ARROW),
    (b"ORC", "ORC", PANDAS.replace("{0}", "read_orc")),
    (b"PK\x03\x04", "an Excel workbook, or a zip archive (unzip it)", PANDAS.replace("{0}", "read_excel")),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", PANDAS.replace("{0}", "read_excel")),
    (b"\x80\x04\x95", "a Python pickle", PANDAS.replace("{0}", "read_pickle")),
    (b"\x80\x05\x95", "a Python pickle", PANDAS.replace("{0}", "read_pickle")),
    (b"SQLite format 3\0", "an SQLite database", "sqlite3 -csv -header {1} 'SELECT * FROM ...' > {3}"),
    (b"BZh", "packed with bzip2", "bunzip2 -k {1}"),
    (b"\xfd7zXZ\0", "packed with xz", "xz -dk {1}"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "zstd -d {1}"),
    (b"%PDF", "a PDF", "pdftotext {1}"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "git lfs pull"),
    (b"<!DOCTYPE html", "a web page", "download the file itself"),
)  # fmt: skip


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
    with _file_errors(path):
        format = _check_encoding(path, format)
        with _open_text(path, format.encoding) as file:
            start = file.read(SAMPLE)
        kind = _find_kind(path, start, format)
        if kind == "separated":
            return read_separated(path, read_lines(path, format.encoding), format.delimiter, format.columns)
        readers = {"json": _read_json, "document": _read_document, "pairs": _read_bars, "text": _read_text}
        return _guarded(path, readers[kind](path, format.encoding)), ""


def _guarded(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    with _file_errors(path):
        yield from records


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}): download or pack it again") from None
    except UnicodeError as error:
        raise UserError(f"{path}: cannot be decoded: {error}; give another --encoding") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


# Bytes -> lines


def _check_encoding(path: Path, format: FileFormat) -> FileFormat:
    """The encoding of a file: the user's, or that of its byte order mark. Refuses what is not text."""
    with open(path, "rb") as file:
        first = file.read(64)
    for magic, kind, command in BINARY_KINDS:
        if first.startswith(magic):
            text, table = path.with_suffix(".jsonl").name, path.with_suffix(".csv").name
            command = command.format("", path.name, text, table)
            raise UserError(f"{path}: this is {kind}, convert it to text first: {command}")
    try:
        "a".encode(format.encoding)
    except (LookupError, ValueError):
        raise UserError(f"--encoding {format.encoding!r:.40}: not a known encoding; utf-8, cp1252, latin-1, "
                        "shift_jis and gb18030 are some") from None
    if format.encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig"):
        return format
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if first.startswith(mark):
            return FileFormat(encoding, format.delimiter, format.columns)
    return FileFormat("utf-8", format.delimiter, format.columns)


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    """Only a line feed ends a line: U+2028, or a carriage return inside a JSON string, does not. A byte that
    cannot be decoded becomes a lone surrogate, so that read_lines can say where it is."""
    raw: BinaryIO = gzip.open(path) if _is_gzip(path) else open(path, "rb")
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # drops the mark at the start
    return io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline="\n")


def read_lines(path: Path, encoding: str, limit: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Number from 1, text with its line end, and the problem of the line (its text is empty then)."""
    packed = _is_gzip(path)
    number = total = 0
    with _file_errors(path), _open_text(path, encoding) as file:
        while text := file.readline(limit + 1):
            number += 1
            total += len(text)
            if packed and total > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNPACKED_BYTES // 2**30} GiB unpacked: "
                                "unpack it with gunzip first")
            problem = _line_problem(text, encoding, limit)
            yield Line(number, "" if problem else text, problem)
            while len(text) > limit and not text.endswith("\n"):
                text = file.readline(limit + 1) or "\n"
                total += len(text)


def _line_problem(text: str, encoding: str, limit: int) -> str:
    if len(text) > limit:
        return f"more than {limit // 2**20} MiB in one line"
    if "\0" in text:
        before = text[: text.index("\0")].encode(encoding, "surrogateescape")
        return (f"byte {len(before) + 1} is NUL: a binary file, or UTF-16 without a mark "
                "(--encoding utf-16-le or utf-16-be)")
    undecoded = None if text.isascii() else re.search("[\udc80-\udcff]", text)
    if undecoded is None:
        return ""
    before = text[: undecoded.start()].encode(encoding, "surrogateescape")
    byte = ord(undecoded[0]) - 0xDC00
    return (f"byte {len(before) + 1} ({byte:#04x}) is not {encoding.upper()}: give the file's encoding, "
            "such as --encoding cp1252")


def _find_kind(path: Path, start: str, format: FileFormat) -> str:
    name = path.name.lower().removesuffix(".gz")
    suffix = os.path.splitext(name)[1]
    if format.columns is not None or format.delimiter is not None:
        return "separated"
    if suffix in JSON_SUFFIXES or re.match(r'\s*(\{\s*"|\[\s*\{)', start):
        return "document" if _is_document(start, suffix) else "json"
    if suffix in SEPARATED_SUFFIXES or start[:4].lower() == "sep=" or _has_tabs(start):
        return "separated"
    if suffix in TEXT_SUFFIXES:
        first_line = start.lstrip().partition("\n")[0]
        return "pairs" if "||" in first_line else "text"
    raise UserError(f"{path}: unknown kind of file {suffix!r:.20}, and its content is not JSON; known are "
                    f"{' '.join(SUFFIXES)}, packed with gzip or not: rename the file, or give --delimiter")


def _has_tabs(start: str) -> bool:
    """A table although its name does not say so: the first lines have as many tabs each."""
    lines = [line for line in start.split("\n")[:6] if line.strip()][:5]
    counts = {line.count("\t") for line in lines}
    return len(lines) > 1 and len(counts) == 1 and 0 not in counts and not lines[0].startswith("\t")


# JSON: objects, one on a line; or a document that holds them


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


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(items)
    if len(fields) < len(items):
        raise ValueError("an object names the same field twice")
    return fields


# Not strict: a raw tab or carriage return inside a string breaks JSON's rules, but can mean one thing only.
_decoder = json.JSONDecoder(strict=False, object_pairs_hook=_unique_keys, parse_float=SourceFloat)
_SPACE = re.compile(r"[ \t\n\r]*")


def parse_json(text: str, several: bool = False) -> Any:
    """The value of a JSON text, or the list of its values if there may be `several`, one after another.
    Raises ValueError that says in one line what is wrong."""
    values = []
    begin = _SPACE.match(text).end()
    try:
        if not several:
            return _decoder.decode(text)
        while begin < len(text):
            value, end = _decoder.raw_decode(text, begin)
            values.append(value)
            begin = _SPACE.match(text, end).end()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    return values


def _read_json(path: Path, encoding: str) -> Iterator[Record]:
    """An object on each line."""
    records = _parse_lines(path, encoding)
    first = list(itertools.islice(records, 2))
    if len(first) == 1 and not first[0].problem:
        yield from _rows_of(path, first[0].where, first[0].fields)
    else:
        yield from first
        yield from records


def _parse_lines(path: Path, encoding: str) -> Iterator[Record]:
    for number, text, problem in read_lines(path, encoding):
        where = f"{path.name}:{number}"
        if problem:
            yield Record(where, {}, problem)
        elif text.strip():
            try:
                value = parse_json(text)
            except ValueError as error:
                yield Record(where, {}, str(error))
            else:
                yield _object_record(where, value)


def _object_record(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    return Record(where, {}, f"the row is {kind_of(value)}, and must be an object")


def _read_document(path: Path, encoding: str) -> Iterator[Record]:
    """A list of objects, an object that holds the list, or objects one after another over many lines."""
    too_large = f"more than {MAX_JSON_BYTES // 2**20} MiB, make it .jsonl, an object a line"
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {too_large}")
    texts = []
    total = 0
    for number, text, problem in read_lines(path, encoding, MAX_JSON_BYTES):
        total += len(text)
        if total > MAX_JSON_BYTES:
            problem = too_large
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
        texts.append(text)
    try:
        values = parse_json("".join(texts), several=True)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if len(values) == 1 and isinstance(values[0], dict):
        yield from _rows_of(path, f"{path.name}: row 1", values[0])
        return
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    elif len(values) == 1:
        raise UserError(f"{path}: {kind_of(values[0])}, and must be a list of objects")
    for number, value in enumerate(values, 1):
        yield _object_record(f"{path.name}: row {number}", value)


LIST_FIELDS = ("data", "rows", "examples", "instances", "items", "records", "samples")


def _rows_of(path: Path, where: str, fields: dict[str, Any]) -> Iterator[Record]:
    """The only object of a file: it is a row, or it holds the rows in one of its fields or as columns."""
    rows = _held_rows(fields)
    if rows is None:
        yield Record(where, fields)
        return
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row:
            row = row["row"]  # as the Hub's viewer gives them
        yield _object_record(f"{path.name}: row {number}", row)


def _held_rows(fields: dict[str, Any]) -> list[Any] | None:
    values = list(fields.values())
    for name in LIST_FIELDS:
        if isinstance(fields.get(name), list):
            return fields[name]
    if len(values) > 1 and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) == 1:  # columns: {"prompt": [...], "completion": [...]}
            return [dict(zip(fields, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) and value for value in values):
        keys = list(values[0])
        if all(list(value) == keys for value in values) and all(key.isdigit() for key in keys):
            return [{name: fields[name][key] for name in fields} for key in keys]  # pandas' columns
        if all(name.isdigit() for name in fields):
            return values  # pandas' index
    return None


# Text


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
