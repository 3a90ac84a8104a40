"""The figures that eval.py RUN --latency, --shots and --bias added to result.json, as columns of the comparison."""

from typing import Any

from minift.report.table import Columns


def percent(score: dict[str, Any]) -> str:
    return f"{score['share']:.1%}"


def points(change: dict[str, Any]) -> str:
    """A change in percentage points, with its interval."""
    values = (change["share"], *change["interval"])
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in values))


milliseconds = "{:.2f}".format
COLUMNS: Columns = {
    "base_ms": ("base ms/token", milliseconds),
    "tuned_ms": ("ms/token", milliseconds),
    "merged_ms": ("merged ms/token", milliseconds),
    "first_token_ms": ("first token ms", milliseconds),
    "speed_16": ("tokens/s, 16 at once", "{:,.0f}".format),
    "shots": ("base with shots", "{:g}".format),
    "shots_rougeL": ("its ROUGE-L", "{:.4f}".format),
    "shots_loss": ("its loss", "{:.4f}".format),
    "shots_tokens": ("its prompt tokens", "{:,.0f}".format),
    "own_tokens": ("prompt tokens", "{:,.0f}".format),
    "base_bias": ("base bias", percent),
    "bias": ("bias", percent),
    "bias_change": ("change, points", points),
}


def values(result: dict[str, Any]) -> dict[str, Any]:
    """The values of a run's columns, absent where they were not measured."""
    found: dict[str, Any] = {}
    latency, shots, bias = (result.get(name) for name in ("latency", "shots", "bias"))
    if latency:
        for model in ("base", "tuned", "merged"):
            if model in latency:  # not every mode can merge
                found[f"{model}_ms"] = latency[model]["1"]["ms_per_token"]
        found["first_token_ms"] = latency["tuned"]["1"]["first_token_ms"]
        found["speed_16"] = latency["tuned"]["16"]["tokens_per_second"]
    if shots:
        found |= {"shots": shots["fitted"], "shots_tokens": shots["prompt_tokens"], "shots_loss": shots["loss"],
                  "shots_rougeL": shots.get("rougeL"), "own_tokens": shots["models"]["tuned"]["prompt_tokens"]}
    if bias:
        found |= {"base_bias": bias["base"]["all"], "bias": bias["tuned"]["all"], "bias_change": bias["change"]["all"]}
    return found
