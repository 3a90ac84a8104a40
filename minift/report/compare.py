"""Runs side by side: one table, and what it says in plain sentences."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minift.errors import UserError
from minift.files.atomic import write_json, write_text
from minift.report import plot

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
NEEDED = COLUMNS.keys() | {"base_test_loss", "base_rougeL", "best_step", "steps"}


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
    """What the numbers say, one plain sentence each, under the name of the run it is about: `run`, or the
    mode. Quality is ROUGE-L on the test rows, and the test loss where that ties; cost is the number of
    parameters that train. Runs whose untouched bases score differently are not ranked."""
    said: dict[str, list[str]] = {name(result): [] for result in results}
    if comparable(results):
        best = max(results, key=lambda r: (r["rougeL"], -r["test_loss"]))
        said[name(best)].append(f"{name(best)} is the best: ROUGE-L {best['rougeL']:.3f}, test loss "
                                f"{best['test_loss']:.4f} (base: {best['base_rougeL']:.3f}, "
                                f"{best['base_test_loss']:.4f}).")
        near = [r for r in results if r["rougeL"] >= 0.99 * best["rougeL"]]
        cheap = min(near, key=lambda r: r["trainable_parameters"])
        said[name(cheap)].append(f"{name(cheap)} is the cheapest within 1 % of the best ROUGE-L: it trains "
                                 f"{cheap['trainable_share']:.2%} of the parameters, and its file takes "
                                 f"{size(cheap['tuned_bytes'])}.")
        measured = [r for r in results if r["forgetting"] is not None]
        if measured:
            least = min(measured, key=lambda r: r["forgetting"])
            said[name(least)].append(f"{name(least)} forgot the least: {least['forgetting']:+.4f} nats a "
                                     "token on the general text.")
    for r in results:
        if r["test_loss"] >= r["base_test_loss"]:
            said[name(r)].append(f"{name(r)} did not beat the base: try another --lr or more --steps.")
        elif r["best_step"] < r["steps"]:
            said[name(r)].append(f"{name(r)} overfitted: its validation loss was lowest at step "
                                 f"{r['best_step']} of {r['steps']}, and those parameters were kept.")
    return said


def comparable(results: list[dict[str, Any]]) -> bool:
    """Whether the untouched bases score alike: the same base on the same rows in the same dtype does."""
    return len({(r["base_test_loss"], r["base_rougeL"]) for r in results}) == 1


def name(result: dict[str, Any]) -> str:
    return result.get("run", result["mode"])


def write(folder: Path, results: list[dict[str, Any]]) -> str:
    """compare.json, a list of the results with their findings, and compare.md, the same to read; gives the
    latter's text."""
    said = findings(results)
    write_json(folder / "compare.json", [result | {"findings": said[name(result)]} for result in results])
    return write_table(folder, results, COLUMNS)


def write_modes(path: Path, chosen: list[str]) -> None:
    """The modes of a comparison that begins; its results follow when it ends."""
    write_json(path, [{"mode": mode} for mode in chosen])


def write_table(folder: Path, results: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """compare.md: the table, then the findings; gives its text."""
    sentences = [f"- {sentence}" for sentences in findings(results).values() for sentence in sentences]
    text = "\n".join([table(results, columns), "", *sentences, ""])
    write_text(folder / "compare.md", text)
    return text


def compare_runs(paths: list[Path]) -> str:
    """What eval.py --compare prints: a row for each finished run, a comparison's folder standing for its
    runs. compare.md and, with matplotlib, compare.png go to the folder that holds them all. Raises
    UserError."""
    paths = [path for path in paths if not path.is_file()]  # runs/* matches an older compare.md too
    folders = [run for path in paths
               for run in (sorted(found.parent for found in path.glob("*/result.json")) or [path])]
    unfinished = [folder for folder in folders if not (folder / "result.json").is_file()]
    folders = list(dict.fromkeys(folder for folder in folders if folder not in unfinished))
    if not folders:
        raise UserError(f"--compare {' '.join(map(str, paths))}: no finished run there")
    out = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    results = [load_result(folder) | {"run": folder.absolute().relative_to(out).as_posix()}
               for folder in folders]
    lines = [f"{folder} is left out: it has no result.json, so it has not ended" for folder in unfinished]
    if not comparable(results):
        lines.append("not ranked: their bases score differently before tuning, so base, test rows or dtype "
                     "differ")
    text = write_table(out, results, {"run": "run"} | COLUMNS)
    try:
        plot.draw(out, results)
        lines.append(f"written: {out / 'compare.md'} and {out / 'compare.png'}")
    except ModuleNotFoundError:
        lines.append(f"written: {out / 'compare.md'}; pip install matplotlib to have compare.png drawn too")
    return "\n".join([text, *lines])


def load_result(folder: Path) -> dict[str, Any]:
    """result.json. Raises UserError where it is damaged."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if missing := NEEDED - result.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        return result
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be used: {error}; leave this run out") from None
