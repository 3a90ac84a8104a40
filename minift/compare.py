"""Runs side by side: one table, and what it says in plain sentences."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .run import write_atomically, write_json

COLUMNS = {
    "mode": "mode",
    "learning_rate": "lr",
    "trainable_parameters": "trainable",
    "trainable_share": "share",
    "peak_memory_bytes": "peak memory",
    "predicted_peak_bytes": "predicted",
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
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
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
    if column == "flops_per_token":
        return f"{value:.2e}"
    if column == "forgetting":
        return f"{value:+.4f}"
    if column == "learning_rate":
        return f"{value:g}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def table(results: Iterable[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    """A Markdown table, aligned to be read as plain text too. `columns` maps a result's names to headings."""
    rows = [list(columns.values()), *([cell(c, result.get(c)) for c in columns] for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def findings(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What the numbers say, one plain sentence each, under the mode it is about. Quality is ROUGE-L on the
    test rows, and the test loss where that ties; cost is the number of parameters that train."""
    said: dict[str, list[str]] = {result["mode"]: [] for result in results}
    best = max(results, key=lambda r: (r["rougeL"], -r["test_loss"]))
    said[best["mode"]].append(f"{best['mode']} is the best: ROUGE-L {best['rougeL']:.3f}, test loss "
                              f"{best['test_loss']:.4f} (base: {best['base_rougeL']:.3f}, "
                              f"{best['base_test_loss']:.4f}).")
    near = [r for r in results if r["rougeL"] >= 0.99 * best["rougeL"]]
    cheap = min(near, key=lambda r: r["trainable_parameters"])
    said[cheap["mode"]].append(f"{cheap['mode']} is the cheapest within 1 % of the best ROUGE-L: it trains "
                               f"{cheap['trainable_share']:.2%} of the parameters, and its file takes "
                               f"{size(cheap['tuned_bytes'])}.")
    measured = [r for r in results if r["forgetting"] is not None]
    if measured:
        least = min(measured, key=lambda r: r["forgetting"])
        said[least["mode"]].append(f"{least['mode']} forgot the least: {least['forgetting']:+.4f} nats a "
                                   "token on the general text.")
    for r in results:
        if r["test_loss"] >= r["base_test_loss"]:
            said[r["mode"]].append(f"{r['mode']} did not beat the base: try another --lr or more --steps.")
        elif r["best_step"] < r["steps"]:
            said[r["mode"]].append(f"{r['mode']} overfitted: its validation loss was lowest at step "
                                   f"{r['best_step']} of {r['steps']}, and those parameters were kept.")
    return said


def write(folder: Path, results: list[dict[str, Any]]) -> str:
    """compare.json, a list of the results with their findings, and compare.md, the same to read; gives the
    latter's text."""
    said = findings(results)
    write_json(folder / "compare.json", [result | {"findings": said[result["mode"]]} for result in results])
    sentences = [f"- {sentence}" for result in results for sentence in said[result["mode"]]]
    text = "\n".join([table(results), "", *sentences, ""])
    write_atomically(folder / "compare.md", text)
    return text
