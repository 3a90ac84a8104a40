"""Tables of separated values (CSV, TSV) -> records. The separator and the meaning of quotes are found by trial.

A dialect is tried by splitting the whole file with it: the fewer rows differ in their number of fields, the better.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minift.data.records import Line, Record, list_names
from minift.errors import UserError

MAX_FIELD = 16 * 2**20  # characters; Python's limit of 131,072 is too small for long documents
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
    """A row before its fields have names: the numbers of its lines, and its values or the reason why it has none."""

    first_line: int
    last_line: int
    values: list[str]
    problem: str = ""


def read_separated(path: Path, lines: Iterable[Line], delimiter: str | None,
                   columns: str | None) -> tuple[Iterator[Record], str]:
    """The records of a table, and a note on its dialect if it is unusual.

    The first row names the fields, unless `columns` does ("prompt,completion"). Quoted fields may hold line ends; a
    row is known by its first line. Raises UserError.
    """
    texts: list[str] = []
    for number, text, problem in lines:
        if problem:  # never skipped: it may lie inside quotes, and the start of the next row is unknown
            raise UserError(f"{path}:{number}: {problem}")
        texts += io.StringIO(text, newline="")  # also ends a line at a lone carriage return

    skipped = 0
    sep_line = re.match(r'"?sep=(.)"?\s*$', texts[0], re.IGNORECASE) if texts else None
    if sep_line:  # Excel writes the separator into a first line: sep=;
        texts, skipped = texts[1:], 1

    names = columns.split(",") if columns is not None else None
    if names is not None and not all(name.strip() for name in names):
        raise UserError(f"--columns {columns!r:.80}: must be names with commas between them")
    known = None
    if delimiter is not None:
        known = _parse_delimiter(delimiter)
    elif sep_line:
        known = sep_line[1]
    usual = SUFFIX_DELIMITERS.get(path.suffix.lower(), ",")
    dialect = _find_dialect(usual, texts, known, names)
    note = str(dialect) if dialect != Dialect(usual) else ""
    return _name_fields(path, _split_rows(texts, dialect), names, skipped), note


def _parse_delimiter(text: str) -> str:
    """The character of --delimiter. Raises UserError."""
    delimiter = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise UserError(f"--delimiter {text!r:.40}: must be one character, or tab")
    return delimiter


def _split_rows(texts: list[str], dialect: Dialect) -> Iterator[Split]:
    """The rows of a table without blank lines. If a quote is never closed, the last row has a problem."""
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
            continue  # the reader begins again at the next line
        if values is None:
            return
        if values:
            yield Split(first, reader.line_num, values)


# ---- the dialect


@dataclass(frozen=True)
class Fit:
    """How well a dialect reads a file."""

    fields: int  # of the first row, or as many as --columns names
    rows: int
    bad: int  # rows with another number of fields
    has_line_ends: bool  # some quoted field holds a line end
    has_spaced_quotes: bool  # some field has a space in front of its quotes: they were not read as quotes
    is_broken: bool  # a quote is never closed

    @property
    def bad_share(self) -> float:
        """The share of bad rows in 0..1; infinity if the file cannot be read to its end."""
        return float("inf") if self.is_broken else self.bad / max(self.rows, 1)


def _measure_fit(texts: list[str], dialect: Dialect, names: list[str] | None) -> Fit:
    """Split all rows with a dialect, and count those that do not fit."""
    fields = len(names) if names else 0
    rows = bad = 0
    has_line_ends = has_spaced_quotes = is_broken = False
    for split in _split_rows(texts, dialect):
        rows += 1
        fields = fields or len(split.values)
        if split.problem or len(_drop_empty(split.values, fields)) != fields:
            bad += 1
        if split.last_line > split.first_line:
            has_line_ends = True
            is_broken = is_broken or bool(split.problem)
        if not has_spaced_quotes:
            has_spaced_quotes = any(re.fullmatch(r' +".*" *', value) for value in split.values)
    return Fit(fields, rows, bad, has_line_ends, has_spaced_quotes, is_broken)


def _find_dialect(usual: str, texts: list[str], delimiter: str | None, names: list[str] | None) -> Dialect:
    """The dialect that fits a table best. `usual` is the separator of the file's name, `delimiter` that of the user."""
    if delimiter is None:
        first = next((text for text in texts if text.strip()), "")
        # min() below keeps the earliest of equals, so the usual separator wins a tie
        possible = [usual, *(other for other in DELIMITERS if other != usual)]
        present = [candidate for candidate in possible if candidate in first]
        delimiter = present[0] if present else usual
        if len(present) > 1:
            delimiter = min(present, key=lambda each: _delimiter_rank(texts, each, names))
    dialect = Dialect(delimiter)
    if not any('"' in text for text in texts):
        return dialect  # the other properties of a dialect are about quotes

    fit = _measure_fit(texts, dialect, names)
    if delimiter in "\t|":
        # Such files often hold plain text, in which a quote is a character like any other. It is one here if the
        # lines fit without quoting, and quoting would merge lines or fail.
        plain = _measure_fit(texts, Dialect(delimiter, quotes=False), names)
        if plain.bad_share < fit.bad_share or plain.bad_share == fit.bad_share and fit.has_line_ends:
            return Dialect(delimiter, quotes=False)
    elif fit.has_spaced_quotes or fit.bad_share:
        skipping = _measure_fit(texts, Dialect(delimiter, skip_space=True), names)
        if skipping.bad_share < fit.bad_share or skipping.bad_share == fit.bad_share and fit.has_spaced_quotes:
            return Dialect(delimiter, skip_space=True)
    return dialect


def _delimiter_rank(texts: list[str], delimiter: str, names: list[str] | None) -> tuple[bool, float]:
    """A key that sorts separators, best first: more than one field, then few rows that differ from the first."""
    fit = _measure_fit(texts, Dialect(delimiter), names)
    if fit.is_broken:
        fit = _measure_fit(texts, Dialect(delimiter, quotes=False), names)
    return fit.fields < 2, fit.bad_share


# ---- rows -> records


def _drop_empty(values: list[str], fields: int) -> list[str]:
    """The values without the empty ones after the last column, which spreadsheets add."""
    if any(values[fields:]):
        return values
    return values[:fields]


def _name_fields(path: Path, rows: Iterator[Split], names: list[str] | None, skipped: int) -> Iterator[Record]:
    """The records of rows; `skipped` lines of the file came before them. Raises UserError for an open quote."""
    header = _unique_names(names) if names is not None else None
    for row in rows:
        first = row.first_line + skipped
        where = f"{path.name}:{first}"
        # never skipped: an open quote takes all lines after it, and without a header no row can be read
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
            source = "--columns names" if names is not None else "the header has"
            yield Record(where, {}, f"{len(values)} fields, and {source} {len(header)}: {list_names(header)}")


def _unique_names(names: list[str]) -> list[str]:
    """Column names, with a number for a column that has no name, or a name that another column has too.

    So a file with such columns is refused only if one of them is used.
    """
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
