"""The one table printer: Markdown, aligned so that it also reads well in a terminal."""

from collections.abc import Callable, Iterable
from typing import Any

# {name of a value in a result: (heading, how the value is written)}
Columns = dict[str, tuple[str, Callable[[Any], str]]]


def format_bytes(count: float) -> str:
    """Bytes in binary units: 1,048,576 is 1.0 MiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def cell(value: Any, format_value: Callable[[Any], str]) -> str:
    """A value as text; None, a value that was not measured, is a dash."""
    return "-" if value is None else format_value(value)


def table(results: Iterable[dict[str, Any]], columns: Columns) -> str:
    """A whole table; each column is as wide as its widest cell."""
    results = list(results)
    widths = []
    for name, (heading, format_value) in columns.items():
        cells = [cell(result.get(name), format_value) for result in results]
        widths.append(max(map(len, [heading, *cells])))
    return "\n".join([table_head(columns, widths), *(table_row(r, columns, widths) for r in results)])


def table_head(columns: Columns, widths: list[int]) -> str:
    """The headings and the line below them. A benchmark prints its rows one by one, as they are measured, so
    it chooses the widths before it has the cells."""
    headings = [heading for heading, _ in columns.values()]
    rule = ["-" * (width + 1) for width in widths]  # a cell and the two spaces around it, less one
    return f"{align(headings, widths)}\n|{rule[0]}-|{':|'.join(rule[1:])}:|"


def table_row(result: dict[str, Any], columns: Columns, widths: list[int]) -> str:
    """One line; a value that the result lacks is a dash."""
    cells = [cell(result.get(name), format_value) for name, (_, format_value) in columns.items()]
    return align(cells, widths)


def align(cells: list[str], widths: list[int]) -> str:
    """The first column to the left, as it holds names, and the others, numbers, to the right."""
    padded = [cells[0].ljust(widths[0])]
    for text, width in zip(cells[1:], widths[1:], strict=True):
        padded.append(text.rjust(width))
    return f"| {' | '.join(padded)} |"
