"""JSON -> records: an object on each line, or a document that holds the rows."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minift.data.lines import read_lines
from minift.data.records import Record, SourceFloat, kind_of
from minift.errors import UserError

MAX_JSON_BYTES = 256 * 2**20  # a JSON document is parsed in memory, and may be one line


LIST_FIELDS = ("data", "rows", "examples", "instances", "items", "records", "samples")  # may hold a file's rows


# ---- text -> values


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a repeated key, of which Python's parser would keep the last one without a word."""
    fields = dict(items)
    if len(fields) < len(items):
        raise ValueError("an object names the same field twice")
    return fields


# strict=False: a raw tab or carriage return inside a string breaks JSON's rules, but has only one meaning.
_decoder = json.JSONDecoder(strict=False, object_pairs_hook=_unique_keys, parse_float=SourceFloat)
_SPACE = re.compile(r"[ \t\n\r]*")


def parse_json(text: str, several: bool = False) -> Any:
    """The value of a JSON text; with `several`, the list of its values, one after another.

    Raises ValueError with the flaw in one line.
    """
    try:
        if not several:
            return _decoder.decode(text)
        values = []
        begin = _SPACE.match(text).end()
        while begin < len(text):
            value, end = _decoder.raw_decode(text, begin)
            values.append(value)
            begin = _SPACE.match(text, end).end()
        return values
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None


# ---- values -> records


def read_json_lines(path: Path, encoding: str) -> Iterator[Record]:
    """The records of a file with an object on each line."""
    records = _parse_lines(path, encoding)
    first = list(itertools.islice(records, 2))
    # a file of one line is often a document, with all rows inside its only object
    if len(first) == 1 and not first[0].problem:
        yield from _rows_of(path, first[0].where, first[0].fields)
    else:
        yield from first
        yield from records


def _parse_lines(path: Path, encoding: str) -> Iterator[Record]:
    """A record for each line that is not blank."""
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


def read_json_document(path: Path, encoding: str) -> Iterator[Record]:
    """The records of a list of objects, of an object that holds the list, or of objects one after another.

    Raises UserError for a file that is too large or not JSON.
    """
    too_large = f"more than {MAX_JSON_BYTES // 2**20} MiB, make it .jsonl, an object a line"
    if path.stat().st_size > MAX_JSON_BYTES:  # before it is read; a gzip file may unpack to more
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


def _rows_of(path: Path, where: str, fields: dict[str, Any]) -> Iterator[Record]:
    """The only object of a file: it is a row, or it holds the rows in one of its fields or as columns."""
    rows = _held_rows(fields)
    if rows is None:
        yield Record(where, fields)
        return
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row:
            row = row["row"]  # the Hub's dataset viewer puts each row into such an object
        yield _object_record(f"{path.name}: row {number}", row)


def _held_rows(fields: dict[str, Any]) -> list[Any] | None:
    """The rows inside an object, or None if it is itself a row."""
    values = list(fields.values())
    for name in LIST_FIELDS:
        if isinstance(fields.get(name), list):
            return fields[name]
    # columns of equal length: {"prompt": [...], "completion": [...]}
    if len(values) > 1 and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) == 1:
            return [dict(zip(fields, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) and value for value in values):
        # pandas.to_json(orient="columns"): {"prompt": {"0": ..., "1": ...}, "completion": {...}}
        keys = list(values[0])
        if all(list(value) == keys for value in values) and all(key.isdigit() for key in keys):
            return [{name: fields[name][key] for name in fields} for key in keys]
        # pandas.to_json(orient="index"): {"0": {"prompt": ..., "completion": ...}, "1": {...}}
        if all(name.isdigit() for name in fields):
            return values
    return None
