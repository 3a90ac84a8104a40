"""Bytes -> lines of text: encodings, gzip, and the kinds of files that are not text.

Files may be hostile: the limits below bound the memory that they cost.
"""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minift.data.records import Line
from minift.errors import UserError

MAX_LINE_BYTES = 16 * 2**20  # counted in characters once the line is decoded
MAX_UNPACKED_BYTES = 2**30  # a gzip file can be a thousand times larger than it looks
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
PANDAS = 'python -c "import pandas; pandas.{0}({1!r}).to_json({2!r}, orient=\'records\', lines=True)"'
ARROW = 'python -c "import datasets; datasets.Dataset.from_file({1!r}).to_json({2!r})"'
# First bytes of files that are not text, the name of their kind, and the command that converts them.
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


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}): download or pack it again") from None
    except UnicodeError as error:
        raise UserError(f"{path}: cannot be decoded: {error}; give another --encoding") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def find_encoding(path: Path, encoding: str) -> str:
    """The encoding of a file: the user's, or that of its byte order mark. Refuses what is not text."""
    with open(path, "rb") as file:
        first = file.read(64)
    for magic, kind, command in BINARY_KINDS:
        if first.lower().startswith(magic.lower()):
            text, table = path.with_suffix(".jsonl").name, path.with_suffix(".csv").name
            command = command.format("", path.name, text, table)
            raise UserError(f"{path}: this is {kind}, convert it to text first: {command}")
    try:
        "a".encode(encoding)
    except (LookupError, ValueError):
        raise UserError(f"--encoding {encoding!r:.40}: not a known encoding; utf-8, cp1252, latin-1, "
                        "shift_jis and gb18030 are some") from None
    if encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig"):
        return encoding
    for mark, marked in BYTE_ORDER_MARKS.items():
        if first.startswith(mark):
            return marked
    return "utf-8"


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    """Only a line feed ends a line: U+2028, or a carriage return inside a JSON string, does not. A byte that
    cannot be decoded becomes a lone surrogate, so that read_lines can say where it is."""
    raw: BinaryIO = gzip.open(path) if _is_gzip(path) else open(path, "rb")
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # drops the mark at the start
    return io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline="\n")


def read_lines(path: Path, encoding: str, limit: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Number from 1, text with its line end, and the problem of the line (its text is empty then)."""
    packed = _is_gzip(path)
    number = total = 0
    inside = False  # the rest of a line that was too long
    with file_errors(path), open_text(path, encoding) as file:
        while text := file.readline(limit + 1):
            total += len(text)
            if packed and total > MAX_UNPACKED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNPACKED_BYTES // 2**30} GiB unpacked: "
                                "unpack it with gunzip first")
            if not inside:
                number += 1
                problem = _line_problem(text, encoding, limit)
                yield Line(number, "" if problem else text, problem)
            inside = (inside or len(text) > limit) and not text.endswith("\n")


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
