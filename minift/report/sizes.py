"""Runs on bases of several sizes: quality by mode and size (Lester et al. 2021, figure 1)."""

from typing import Any

from minift.report.runs import Run
from minift.report.table import Columns, table


def of_several_sizes(runs: list[Run]) -> bool:
    """Whether runs on two or more sizes of base were measured on the same test rows."""
    places = [run.rows[0].where for run in runs if run.rows]
    measured = all(run.result["test_loss"] is not None for run in runs)
    return measured and len(sizes(runs)) > 1 and all(place == places[0] for place in places)


def sizes(runs: list[Run]) -> list[int]:
    """The parameters of the bases, from small to large."""
    return sorted({run.result["total_parameters"] for run in runs if run.result.get("total_parameters")})


def quality_of(runs: list[Run]) -> tuple[str, str]:
    """The measure that all runs have, and its label: ROUGE-L, else the test loss."""
    if all(run.result["rougeL"] is not None for run in runs):
        return "rougeL", "ROUGE-L on the test rows"
    return "test_loss", "test loss, nats per target token"


def by_mode(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """{mode: {size: run}}. Of several runs of a mode and size, the one with the lowest validation loss."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        size = run.result.get("total_parameters")
        if size:
            of_mode = found.setdefault(run.result["mode"], {})
            of_mode[size] = min(of_mode.get(size, run), run, key=val_loss)
    return found


def val_loss(run: Run) -> float:
    loss = run.result["best_val_loss"]
    return float("inf") if loss is None else loss


def size_table(runs: list[Run]) -> str:
    """A row for each mode, a column for each size of base."""
    measure, _ = quality_of(runs)
    heading = {"rougeL": "ROUGE-L", "test_loss": "test loss"}[measure]
    columns: Columns = {"mode": (f"{heading} by size", str)}
    base: dict[Any, Any] = {"mode": "base"}
    for run in runs:
        size = run.result.get("total_parameters")
        if size:
            base[size] = run.result[f"base_{measure}"]
    for size in sizes(runs):
        columns[size] = (short_count(size), "{:.4f}".format)
    rows = [base]
    for mode, of_mode in by_mode(runs).items():
        rows.append({"mode": mode} | {size: run.result[measure] for size, run in of_mode.items()})
    return table(rows, columns)


def short_count(count: int) -> str:
    """124,439,808 as 124.4M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
