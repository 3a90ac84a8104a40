"""Bytes -> lines of text: encodings, gzip, and a clear refusal of files that are not text.

Files may be hostile: the two limits below bound the memory they can take.
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

# Commands that convert a file; find_encoding fills in the names of the file and of its copy as text.
PANDAS = 'python -c "import pandas; pandas.READ({file!r}).to_json({jsonl!r}, orient=\'records\', lines=True)"'
PARQUET = PANDAS.replace("READ", "read_parquet")
FEATHER = PANDAS.replace("READ", "read_feather")
ORC = PANDAS.replace("READ", "read_orc")
EXCEL = PANDAS.replace("READ", "read_excel")
PICKLE = PANDAS.replace("READ", "read_pickle")
ARROW = 'python -c "import datasets; datasets.Dataset.from_file({file!r}).to_json({jsonl!r})"'
SQLITE = "sqlite3 -csv -header {file} 'SELECT * FROM ...' > {csv}"
# First bytes of files that are not text, the name of the kind, and the command that converts the file.
BINARY_KINDS = (
    (b"PAR1", "Parquet", PARQUET),
    (b"ARROW1", "Arrow", FEATHER),
    (b"\xff\xff\xff\xff", "Arrow", ARROW),
    (b"ORC", "ORC", ORC),
    (b"PK\x03\x04", "an Excel workbook, or a zip archive (unzip it)", EXCEL),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", EXCEL),
    (b"\x80\x04\x95", "a Python pickle", PICKLE),
    (b"\x80\x05\x95", "a Python pickle", PICKLE),
    (b"SQLite format 3\0", "an SQLite database", SQLITE),
    (b"BZh", "packed with bzip2", "bunzip2 -k {file}"),
    (b"\xfd7zXZ\0", "packed with xz", "xz -dk {file}"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "zstd -d {file}"),
    (b"%PDF", "a PDF", "pdftotext {file}"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "git lfs pull"),
    (b"<!DOCTYPE html", "a web page", "download the file itself"),
    (b"<!doctype html", "a web page", "download the file itself"),
)  # fmt: skip


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns every error of opening, unpacking and decoding `path` into a UserError."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}): download or pack it again") from None
    except UnicodeError as error:
        raise UserError(f"{path}: cannot be decoded: {error}; give another --encoding") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def find_encoding(path: Path, encoding: str) -> str:
    """The encoding of a file: the user's, or that of its byte order mark.

    Raises UserError for a file that is not text and for an unknown encoding.
    """
    with open(path, "rb") as file:
        first = file.read(64)
    for magic, kind, command in BINARY_KINDS:
        if first.startswith(magic):
            jsonl, csv = path.with_suffix(".jsonl").name, path.with_suffix(".csv").name
            command = command.format(file=path.name, jsonl=jsonl, csv=csv)
            raise UserError(f"{path}: this is {kind}, convert it to text first: {command}")
    try:
        "a".encode(encoding)  # looks the name up; fails also for codecs that give no bytes, such as rot13
    except (LookupError, ValueError):
        raise UserError(f"--encoding {encoding!r:.40}: not a known encoding; utf-8, cp1252, latin-1, "
                        "shift_jis and gb18030 are some") from None
    # a mark is looked for only under the default encoding: who names another one knows the file
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
    """A file as text, unpacked if it is gzip."""
    raw: BinaryIO = gzip.open(path) if _is_gzip(path) else open(path, "rb")
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # drops the mark at the start
    # surrogateescape: a byte that cannot be decoded becomes a lone surrogate, so that read_lines can name its line.
    # newline="\n": U+2028, or a carriage return inside a JSON string, must not end a line.
    return io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline="\n")


def read_lines(path: Path, encoding: str, limit: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of a file; a line of more than `limit` characters has a problem and no text.

    Raises UserError for a file that cannot be read, or that is too large once it is unpacked.
    """
    packed = _is_gzip(path)
    number = total = 0
    inside = False  # inside a line that is too long, whose rest is read and thrown away
    with file_errors(path), open_text(path, encoding) as file:
        while text := file.readline(limit + 1):  # one more than the limit shows that a line is too long
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
    """The reason why a line cannot be used, or ""."""
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
    byte = ord(undecoded[0]) - 0xDC00  # surrogateescape adds this to the byte
    return (f"byte {len(before) + 1} ({byte:#04x}) is not {encoding.upper()}: give the file's encoding, "
            "such as --encoding cp1252")
