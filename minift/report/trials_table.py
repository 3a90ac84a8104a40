"""The table of the trials of searches, for train.py and for comparisons. A trial is a line of trials.jsonl."""

from typing import Any

from minift.report.table import Columns, table

COLUMNS: Columns = {
    "run": ("mode", str),
    "options": ("options", str),
    "steps": ("steps", str),
    "best_step": ("best step", str),
    "val_loss": ("val loss", "{:.4f}".format),
    "chosen": ("chosen", str),
}
STOPPED: Columns = {"stopped": ("stopped", str)}


def trials_table(trials: list[tuple[str, dict[str, Any]]]) -> str:
    """A row for each trial, given with the name of its run."""
    rows = [trial | {"run": run, "options": option_words(trial["options"]), "chosen": "yes" if trial["chosen"] else ""}
            for run, trial in trials]
    columns = COLUMNS | (STOPPED if any("stopped" in row for row in rows) else {})
    return table(rows, columns)


def option_words(options: dict[str, Any]) -> str:
    """lr 0.001, rank 8"""
    return ", ".join(f"{name.replace('_', '-')} {value:g}" if isinstance(value, float) else
                     f"{name.replace('_', '-')} {value}" for name, value in options.items())
