"""test_rows.jsonl: the measures of each test row, from which differences between runs get an error (bootstrap.py).

A line is {"where": ..., "tuned": {...}, "base": {...}} with the dicts of `metrics.score(...)["rows"]`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minift.errors import UserError
from minift.files.atomic import read_json_lines, write_atomically

NAME = "test_rows.jsonl"
NUMBERS = ("loss", "targets", "rouge1", "rouge2", "rougeL", "exact_match", "names", "unsupported")
# A measure is a ratio of two sums over rows: {name in result.json: (numerator, denominator)}; None counts the rows.
MEASURES = {
    "test_loss": ("loss", "targets"),
    "rougeL": ("rougeL", None),
    "exact_match": ("exact_match", None),
    "unsupported": ("unsupported", "names"),
}


@dataclass
class RowScores:
    """The R test rows of a run: each name of NUMBERS as an array (R,), of the tuned model and of its base.

    A value that a row does not have, such as ROUGE-L of a text alone, is nan.
    """

    where: list[str]
    tuned: dict[str, np.ndarray]
    base: dict[str, np.ndarray]

    def same_rows(self, other: "RowScores") -> bool:
        """Whether these are the same rows: in the same places, and with as many target tokens."""
        return self.where == other.where and np.array_equal(self.tuned["targets"], other.tuned["targets"])


def write(folder: Path, scores: dict[str, Any], base_scores: dict[str, Any]) -> None:
    """Write test_rows.jsonl from the scores of the tuned model and of its base. Raises UserError."""
    pairs = zip(scores["rows"], base_scores["rows"], strict=True)
    lines = (json.dumps(row_line(tuned, base), ensure_ascii=False) + "\n" for tuned, base in pairs)
    write_atomically(folder / NAME, (line.encode("utf-8") for line in lines))


def row_line(tuned: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The line of a row: its place once, then the other values of both models."""
    values = [{name: value for name, value in row.items() if name != "where"} for row in (tuned, base)]
    return {"where": tuned["where"], "tuned": values[0], "base": values[1]}


def read(folder: Path) -> RowScores | None:
    """The rows of a run; None if it has no test_rows.jsonl, as runs of older versions, or no test rows.

    Raises UserError if the file is damaged.
    """
    path = folder / NAME
    lines = read_json_lines(path) if path.is_file() else []
    if not lines:
        return None
    where: list[str] = []
    arrays = {model: {name: np.empty(len(lines)) for name in NUMBERS} for model in ("tuned", "base")}
    for i, line in enumerate(lines):
        try:
            where.append(line["where"])
            for model, values in arrays.items():
                for name in NUMBERS:
                    values[name][i] = line[model][name]  # None becomes nan
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}:{i + 1} cannot be used ({type(error).__name__}: {error}): remove the file to "
                            "compare the run without intervals") from None
    return RowScores(where, arrays["tuned"], arrays["base"])


def terms(values: dict[str, np.ndarray], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator (R,) of a measure in each row; both are 0 in rows that do not have it."""
    numerator, denominator = MEASURES[measure]
    top = values[numerator]
    bottom = np.ones_like(top) if denominator is None else values[denominator]
    known = ~np.isnan(top) & ~np.isnan(bottom)
    return np.where(known, top, 0.0), np.where(known, bottom, 0.0)
