"""The one table printer: Markdown, aligned so that it also reads well in a terminal."""

from collections.abc import Callable, Iterable
from typing import Any

# {name of a value in a result: (heading, function that formats the value)}
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
    """A table of all results; each column is as wide as its longest cell."""
    results = list(results)
    widths = []
    for name, (heading, format_value) in columns.items():
        cells = [cell(result.get(name), format_value) for result in results]
        widths.append(max(map(len, [heading, *cells])))
    lines = [table_head(columns, widths)]
    for result in results:
        lines.append(table_row(result, columns, widths))
    return "\n".join(lines)


def table_head(columns: Columns, widths: list[int]) -> str:
    """The headings and the line below them. `widths` are given: a benchmark prints the head before it has rows."""
    headings = [heading for heading, _ in columns.values()]
    rules = []
    for i, width in enumerate(widths):
        dashes = "-" * (width + 1)  # a cell has a space on both sides, and one of the two is below
        rules.append(dashes + ("-" if i == 0 else ":"))  # a colon aligns to the right in Markdown
    return f"{align(headings, widths)}\n|{'|'.join(rules)}|"


def table_row(result: dict[str, Any], columns: Columns, widths: list[int]) -> str:
    """The line of a result; a value that it lacks is a dash."""
    cells = [cell(result.get(name), format_value) for name, (_, format_value) in columns.items()]
    return align(cells, widths)


def align(cells: list[str], widths: list[int]) -> str:
    """A line of cells. The first column, of names, is aligned to the left, the others, of numbers, to the right."""
    padded = [cells[0].ljust(widths[0])]
    for text, width in zip(cells[1:], widths[1:], strict=True):
        padded.append(text.rjust(width))
    return f"| {' | '.join(padded)} |"
