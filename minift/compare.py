"""Runs side by side: one table, and what it says in plain sentences."""

from collections.abc import Iterable
from typing import Any

COLUMNS = {
    "mode": "mode",
    "learning_rate": "lr",
    "trainable_parameters": "trainable",
    "trainable_share": "share",
    "peak_memory_bytes": "peak memory",
    "tokens_per_second": "tokens/s",
    "best_val_loss": "val loss",
    "test_loss": "test loss",
    "rougeL": "ROUGE-L",
    "exact_match": "exact",
    "forgetting": "forgetting",
    "tuned_bytes": "tuned file",
}


def size(count: float) -> str:
    """Bytes for people: 1,048,576 is 1.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column.endswith("_bytes"):
        return size(value)
    if column == "trainable_share":
        return f"{value:.2%}"
    if column in ("trainable_parameters", "tokens_per_second"):
        return f"{value:,.0f}"
    if column == "forgetting":
        return f"{value:+.4f}"
    if column == "learning_rate":
        return f"{value:g}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def table(results: Iterable[dict[str, Any]]) -> str:
    """A Markdown table, aligned to be read as plain text too."""
    rows = [list(COLUMNS.values()), *([cell(c, result.get(c)) for c in COLUMNS] for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
