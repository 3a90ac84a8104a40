"""The scores of eval.py: base and tuned models side by side with their 95 % intervals, and completions of some rows."""

from typing import Any

import numpy as np

from minift.data.tokens import Example
from minift.report import bootstrap, test_rows
from minift.report.metrics import limit_report
from minift.report.table import table
from minift.report.unsupported import LIMITS

# {a score with an interval: its measure}
MEASURES = {"loss": "test_loss", "exact_match": "exact_match", "rougeL": "rougeL", "unsupported": "unsupported"}
ModelScores = dict[str, dict[str, Any]]  # {"base": ..., "tuned" or the folder of a run: ...}, of `metrics.score`


def add_differences(scores: ModelScores) -> None:
    """Compare each tuned model with the base, see `compare`; `forgetting` if there is a general text."""
    base = scores["base"]
    for model, tuned in scores.items():
        if model != "base":
            compare(base, tuned)
            if base["general_loss"] is not None:
                tuned["forgetting"] = tuned["general_loss"] - base["general_loss"]


def compare(base: dict[str, Any], tuned: dict[str, Any]) -> None:
    """Add to both models' scores `intervals`, {score: (low, high), or None from one row}, and to those of the tuned
    model `difference`, {score: tuned minus base}, with `difference_intervals`."""
    measures = {}
    for model, score in (("base", base), ("tuned", tuned)):
        values = {name: np.array([row[name] for row in score["rows"]], float) for name in test_rows.NUMBERS}
        for name, measure in MEASURES.items():
            if score[name] is not None:
                numerators, denominators = test_rows.terms(values, measure)
                measures[model, name] = (numerators[None], denominators[None])  # (1, R): one seed
    estimates = bootstrap.estimate_all(measures)
    base["intervals"], tuned["intervals"], changes = {}, {}, {}
    for model, name in estimates:
        score = base if model == "base" else tuned
        score["intervals"][name] = bootstrap.interval(estimates[model, name])
        if base[name] is not None and tuned[name] is not None:
            changes[name] = bootstrap.difference(estimates["tuned", name], estimates["base", name])
    tuned["difference"] = {name: change.value for name, change in changes.items()}
    tuned["difference_intervals"] = {name: bootstrap.interval(change) for name, change in changes.items()}


def report(scores: ModelScores, examples: list[Example], shown: int, max_new_tokens: int) -> str:
    """All that eval.py prints of scores: a table, limits that made them worse, `shown` completions, and as many rows
    with the most unsupported content."""
    lines = [side_by_side(scores["base"], scores["tuned"]) if "tuned" in scores else one_row_each(scores)]
    if any(score["unsupported"] is not None for score in scores.values()):
        lines.append(f"unsupported: {LIMITS}")
    if "forgetting" in scores.get("tuned", {}):
        lines.append(f"forgetting: {scores['tuned']['forgetting']:+.4f} nats per token on the general text")
    for model, score in scores.items():
        lines += [f"  {model}: {line}" for line in limit_report(score, max_new_tokens)]
    lines += completions(scores, examples[:shown])
    for model, score in scores.items():
        if model != "base":
            lines += most_unsupported(model, score["rows"], shown)
    return "\n".join(lines)


def names_of(scores: ModelScores) -> list[str]:
    """The scores that a model has a number for."""
    return [name for name in scores["base"] if any(isinstance(score[name], float) for score in scores.values())]


def side_by_side(base: dict[str, Any], tuned: dict[str, Any]) -> str:
    """A table with a line for each score of one tuned model and its base."""
    lines = []
    for name in names_of({"base": base, "tuned": tuned}):
        lines.append({"name": name, "base": base[name], "of_base": base["intervals"].get(name),
                      "tuned": tuned[name], "of_tuned": tuned["intervals"].get(name),
                      "difference": tuned["difference"].get(name),
                      "of_difference": tuned["difference_intervals"].get(name)})
    number, interval = "{:.4f}".format, "{0[0]:.4f} to {0[1]:.4f}".format
    return table(lines, {
        "name": ("", str),
        "base": ("base", number), "of_base": ("95 % interval", interval),
        "tuned": ("tuned", number), "of_tuned": ("95 % interval", interval),
        "difference": ("tuned - base", "{:+.4f}".format),
        "of_difference": ("95 % interval", "{0[0]:+.4f} to {0[1]:+.4f}".format),
    })


def one_row_each(scores: ModelScores) -> str:
    """A table with a line for each of several models."""
    columns = {"model": ("", str)}
    for name in (*names_of(scores), "forgetting"):
        if any(name in score for score in scores.values()):
            columns[name] = (name, "{:.4f}".format)
    return table([{"model": model, **score} for model, score in scores.items()], columns)


def completions(scores: ModelScores, examples: list[Example]) -> list[str]:
    """The completions of some rows by each model, below their references."""
    width = max(map(len, ("reference", *scores)))
    lines = []
    for i, example in enumerate(examples):
        lines += ["", example.pair.where, f"  {'reference':{width}} {example.pair.completion!r}"]
        for model, score in scores.items():
            lines.append(f"  {model:{width}} {score['completions'][i]!r}")
    return lines


def most_unsupported(model: str, rows: list[dict[str, Any]], shown: int) -> list[str]:
    """The completions with the most unsupported names and numbers."""
    flagged = sorted((row for row in rows if row["unsupported"]), key=lambda row: -row["unsupported"])
    if not flagged or not shown:
        return []
    lines = ["", f"{model}: {len(flagged)} of {len(rows)} completions have unsupported content; with the most:"]
    for row in flagged[:shown]:
        lines += [f"{row['where']}: {', '.join(row['unsupported_words'])}", f"  {row['completion']!r}"]
    return lines
