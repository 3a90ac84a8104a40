"""What the scripts of the public data sets share: fetching, finding, reading, checking and writing."""

import argparse
import hashlib
import http.client
import json
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minift.data.readers import SUFFIXES, FileFormat, read_records
from minift.errors import UserError
from minift.files.atomic import write_atomically

Row = dict[str, str]


@dataclass(frozen=True)
class PublicFile:
    """One file of a public data set, and what is known of it."""

    split: str
    url: str
    stems: tuple[str, ...]  # what it may be called in the folder of --source, less its ending
    rows: tuple[int, ...]  # how many rows it is known to give
    sha256: str = ""  # of these rows as `jsonl` writes them, where a copy was at hand


def parse_arguments(description: str, arguments: list[str], out: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a copy at hand, file or folder, instead of fetching")
    parser.add_argument("--out", type=Path, default=out,
                        help="folder for train.jsonl, val.jsonl and test.jsonl (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def read_files(files: tuple[PublicFile, ...], source: Path | None,
               convert: Callable[[dict[str, Any]], list[Row]]) -> dict[str, list[Row]]:
    """The rows of each split, fetched or from `source`; `convert` makes them of one row of the file.

    A count or hash that differs from what is known is an error for a fetched file and a warning for one of
    `source`. UserError also for what cannot be fetched, found or read; `convert` may raise ValueError.
    """
    if source is not None and source.is_file() and len(files) > 1:
        raise UserError(f"--source {source} is one file, give the folder of {len(files)}: "
                        + ", ".join(file.stems[0] for file in files))
    splits = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            path = find(file, source) if source else fetch(file.url, Path(folder))
            splits[file.split] = rows = list(convert_rows(path, convert))
            for problem in differences(file, rows):
                if source is None:
                    raise UserError(f"{file.url}: {problem}: not the file this script was written for; "
                                    "look at it, and pass a copy with --source")
                print(f"warning: {path}: {problem}", file=sys.stderr)
    return splits


def fetch(url: str, folder: Path) -> Path:
    print(f"fetching {url}", flush=True)
    path = folder / url.rsplit("/", 1)[1]
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            path.write_bytes(answer.read())  # whole, for only this read notices that the connection broke off
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot fetch {url}: {getattr(error, 'reason', error)}; fetch it by hand and pass "
                        "the folder it is in with --source") from None
    return path


def find(file: PublicFile, source: Path) -> Path:
    if source.is_file():
        return source
    for stem in file.stems:
        for suffix in SUFFIXES:
            if (path := source / (stem + suffix)).is_file():
                return path
    if not source.exists():
        raise UserError(f"--source {source}: no such file or folder")
    names, endings = " or ".join(file.stems), " ".join(SUFFIXES)
    raise UserError(f"--source {source}: holds no file {names} ending in {endings}")


def convert_rows(path: Path, convert: Callable[[dict[str, Any]], list[Row]]) -> Iterable[Row]:
    records, _ = read_records(path, FileFormat())
    for record in records:
        try:
            if record.problem:
                raise ValueError(record.problem)
            yield from convert(record.fields)
        except ValueError as error:
            raise UserError(f"{path.with_name(record.where)}: {error}") from None


def text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"no text in a field {name!r}; the row's fields are {', '.join(fields)}"[:200])
    value.encode("utf-8")  # JSON can spell half of a surrogate pair: a ValueError
    return value


def differences(file: PublicFile, rows: list[Row]) -> Iterable[str]:
    if len(rows) not in file.rows:
        yield f"{len(rows):,} rows, known are {' or '.join(f'{count:,}' for count in file.rows)}"
    elif file.sha256 and hashlib.sha256(jsonl(rows)).hexdigest() != file.sha256:
        yield f"the right number of rows, {len(rows):,}, but not the known text (sha256)"


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def write_splits(splits: dict[str, list[Row]], out: Path) -> None:
    """Write `out`/train.jsonl and so on, each atomically. Raises UserError when the disk refuses."""
    for split, rows in splits.items():
        path = out / f"{split}.jsonl"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
        content = jsonl(rows)
        write_atomically(path, [content])
        print(f"{path}: {len(rows):,} rows, sha256 {hashlib.sha256(content).hexdigest()}")
