"""Separated values in any dialect: the separator and the meaning of quotes are found out from the file."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minift.data.records import Line, Record, list_names
from minift.errors import UserError

MAX_FIELD = 16 * 2**20
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SUFFIX_DELIMITERS = {".tsv": "\t", ".tab": "\t", ".psv": "|"}  # commas for all other names


@dataclass(frozen=True)
class Dialect:
    delimiter: str
    quotes: bool = True  # False: a quote is a character like any other
    skip_space: bool = False  # spaces after a separator are dropped, as in `a, "b, c"`

    def __str__(self) -> str:
        words = f"separated by {DELIMITERS.get(self.delimiter, repr(self.delimiter))}"
        if not self.quotes:
            words += ", quotes are characters like any other"
        if self.skip_space:
            words += ", spaces after a separator are dropped"
        return words


@dataclass(frozen=True)
class Split:
    """A row before its fields have names: the numbers of its lines, and values or the reason for none."""

    first_line: int
    last_line: int
    values: list[str]
    problem: str = ""


def read_separated(path: Path, lines: Iterable[Line], delimiter: str | None,
                   columns: str | None) -> tuple[Iterator[Record], str]:
    """The records of a table, whose first row names the fields unless `columns` does, and its dialect.

    Quoted fields may hold line ends; a row's place is its first line. Raises UserError.
    """
    texts: list[str] = []
    for number, text, problem in lines:
        if problem:  # never skipped: it may lie inside quotes, and the start of the next row is unknown
            raise UserError(f"{path}:{number}: {problem}")
        texts += io.StringIO(text, newline="")  # also ends a line at a lone carriage return
    skipped = 0
    said = re.match(r'"?sep=(.)"?\s*$', texts[0], re.IGNORECASE) if texts else None
    if said:  # Excel's line that names the separator
        texts, skipped = texts[1:], 1
    names = columns.split(",") if columns is not None else None
    if names is not None and not all(name.strip() for name in names):
        raise UserError(f"--columns {columns!r:.80}: must be names with commas between them")
    given = _parse_delimiter(delimiter) if delimiter is not None else said and said[1]
    usual = SUFFIX_DELIMITERS.get(path.suffix.lower(), ",")
    dialect = _find_dialect(usual, texts, given, names)
    note = str(dialect) if dialect != Dialect(usual) else ""
    return _name_fields(path, _split_rows(texts, dialect), names, skipped), note


def _parse_delimiter(text: str) -> str:
    delimiter = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise UserError(f"--delimiter {text!r:.40}: must be one character, or tab")
    return delimiter


def _split_rows(texts: list[str], dialect: Dialect) -> Iterator[Split]:
    """The rows of a table, blank lines left out. The last one has a problem if a quote is never closed."""
    csv.field_size_limit(MAX_FIELD)
    quoting = csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE
    reader = csv.reader(texts, delimiter=dialect.delimiter, quoting=quoting,
                        skipinitialspace=dialect.skip_space, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Split(first, reader.line_num, [], f"not valid CSV: {error}")
            continue
        if values is None:
            return
        if values:
            yield Split(first, reader.line_num, values)


# The dialect


@dataclass(frozen=True)
class Fit:
    """How well a dialect reads a file."""

    fields: int  # of the first row, or as many as --columns names
    rows: int
    bad: int  # rows with another number of fields
    spans: bool  # a quoted field holds a line end
    spaced: bool  # a field is left with a space in front of its quotes
    broken: bool  # a quote is never closed

    @property
    def badness(self) -> float:
        return float("inf") if self.broken else self.bad / max(self.rows, 1)


def _measure_fit(texts: list[str], dialect: Dialect, names: list[str] | None) -> Fit:
    fields = len(names) if names else 0
    rows = bad = 0
    spans = spaced = broken = False
    for split in _split_rows(texts, dialect):
        several = split.last_line > split.first_line
        fields = fields or len(split.values)
        rows += 1
        bad += bool(split.problem) or len(_drop_empty(split.values, fields)) != fields
        spans = spans or several
        spaced = spaced or any(re.fullmatch(r' +".*" *', value) for value in split.values)
        broken = broken or bool(split.problem) and several
    return Fit(fields, rows, bad, spans, spaced, broken)


def _find_dialect(usual: str, texts: list[str], delimiter: str | None, names: list[str] | None) -> Dialect:
    if delimiter is None:
        first = next((text for text in texts if text.strip()), "")
        possible = [usual, *(other for other in DELIMITERS if other != usual)]
        present = [candidate for candidate in possible if candidate in first]
        delimiter = present[0] if present else usual
        if len(present) > 1:
            delimiter = min(present, key=lambda each: _delimiter_rank(texts, each, names))
    dialect = Dialect(delimiter)
    if not any('"' in text for text in texts):
        return dialect
    fit = _measure_fit(texts, dialect, names)
    if delimiter in "\t|":
        # Exports of plain text: quotes are characters if the lines fit without them, and reading them as
        # quotes would merge lines or fail.
        plain = _measure_fit(texts, Dialect(delimiter, quotes=False), names)
        if plain.badness < fit.badness or plain.badness == fit.badness and fit.spans:
            return Dialect(delimiter, quotes=False)
    elif fit.spaced or fit.badness:
        skipping = _measure_fit(texts, Dialect(delimiter, skip_space=True), names)
        if skipping.badness < fit.badness or skipping.badness == fit.badness and fit.spaced:
            return Dialect(delimiter, skip_space=True)
    return dialect


def _delimiter_rank(texts: list[str], delimiter: str, names: list[str] | None) -> tuple[bool, float]:
    """Sorts the separators of the first row: those which give all rows as many fields come first."""
    fit = _measure_fit(texts, Dialect(delimiter), names)
    if fit.broken:
        fit = _measure_fit(texts, Dialect(delimiter, quotes=False), names)
    return fit.fields < 2, fit.badness


# Rows -> fields


def _drop_empty(values: list[str], fields: int) -> list[str]:
    """The values without empty ones beyond the last column, which spreadsheets add."""
    if any(values[fields:]):
        return values
    return values[:fields]


def _name_fields(path: Path, rows: Iterator[Split], names: list[str] | None,
                 skipped: int) -> Iterator[Record]:
    header = _unique_names(names) if names is not None else None
    named_here = names is not None
    for row in rows:
        first = row.first_line + skipped
        where = f"{path.name}:{first}"
        if row.problem and (header is None or row.last_line > row.first_line):
            raise UserError(f"{path}:{first}: the row that begins here is {row.problem}, line "
                            f"{row.last_line + skipped}; look for an unclosed quote")
        if row.problem:
            yield Record(where, {}, row.problem)
            continue
        if header is None:
            header = _unique_names(row.values)
            continue
        values = _drop_empty(row.values, len(header))
        if len(values) == len(header):
            yield Record(where, dict(zip(header, values, strict=True)))
        else:
            named = f"--columns names {len(header)}" if named_here else f"the header has {len(header)}"
            yield Record(where, {}, f"{len(values)} fields, and {named}: {list_names(header)}")


def _unique_names(names: list[str]) -> list[str]:
    """A column without a name, or with one that another has too, is called by its number, so that a file is
    refused only if such a column is used."""
    names = [name.strip() for name in names]
    counts = Counter(names)
    unique = []
    for number, name in enumerate(names, 1):
        if not name:
            name = f"column {number}"
        elif counts[name] > 1:
            name = f"{name} (column {number})"
        unique.append(name)
    return unique
