"""Runs side by side: tables of cost and quality, and sentences about the best runs and about problems.

A result is a run's result.json, see result.py.
"""

import json
import os
from pathlib import Path
from typing import Any

from minift.distributed import is_main
from minift.errors import UserError
from minift.files.atomic import write_json, write_text
from minift.report import plot, use
from minift.report.findings import Finding, findings
from minift.report.groups import Group, group_runs
from minift.report.runs import Run, find_runs, load_run
from minift.report.sizes import of_several_sizes, size_table
from minift.report.table import Columns, format_bytes, table
from minift.report.trials_table import option_words, trials_table
from minift.run.folder import NEEDED, load_result

four_digits = "{:.4f}".format
percent = "{:.1%}".format


def format_interval(interval: list[float]) -> str:
    return "{:.3f}-{:.3f}".format(*interval)


def percent_interval(interval: list[float]) -> str:
    return "{:.1%}-{:.1%}".format(*interval)


# The columns of the tables: {name in result.json: (heading, function that formats the value)}. A column that
# is not in NEEDED is shown only where a run has a value.
COST: Columns = {
    "learning_rate": ("lr", "{:g}".format),
    "chosen_options": ("chosen", str),
    "trainable_parameters": ("trainable", "{:,}".format),
    "trainable_share": ("share", "{:.2%}".format),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "predicted_peak_bytes": ("predicted", format_bytes),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "steady_tokens_per_second": ("steady tokens/s", "{:,.0f}".format),
    "tuned_bytes": ("tuned file", format_bytes),
}
QUALITY: Columns = {
    "best_val_loss": ("val loss", four_digits),
    "test_loss": ("test loss", four_digits),
    "test_loss_std": ("std", four_digits),
    "test_loss_interval": ("95 %", format_interval),
    "rougeL": ("ROUGE-L", four_digits),
    "rougeL_std": ("std", four_digits),
    "rougeL_interval": ("95 %", format_interval),
    "exact_match": ("exact", four_digits),
    "unsupported": ("unsupported", percent),
    "unsupported_interval": ("95 %", percent_interval),
    "forgetting": ("forgetting", "{:+.4f}".format),
    "forgetting_std": ("std", four_digits),
}
LEGEND = ("Losses are in nats per target token. ROUGE-L compares words, exact is the share of completions equal to "
          "their reference; both ignore white space at the ends.")
LEGENDS = {
    "test_loss_interval": "95 % is the interval from 10,000 resamples of the test rows, and from the seeds where there "
                          "are several. Runs do not differ where the interval of their difference contains 0.",
    "test_loss_std": "Scores are means over the seeds, std is their standard deviation.",
    "unsupported": "Unsupported is the share of names and numbers in the completions that are neither in the prompt "
                   "nor in the reference.",
    "forgetting": "Forgetting is the loss on general text after tuning minus before.",
}


def write(folder: Path, results: list[dict[str, Any]]) -> str:
    """Write compare.json, compare.md and, with matplotlib, pictures of the runs of train.py, whose folders are
    `folder`/MODE. compare.json has the results with intervals, and the findings about each. Returns the text of
    compare.md. Raises UserError."""
    if not is_main():
        return ""  # the other processes may not see the runs' files
    runs = [load_run(folder / result["mode"], result["mode"], dict(result)) for result in results]
    groups = group_runs(runs)
    found = findings(groups)
    write_json(folder / "compare.json", with_findings(runs, found))
    text = write_markdown(folder, runs, groups, found, "mode")
    return "\n".join([text, *draw(folder, runs)])


def write_modes(path: Path, names: list[str]) -> None:
    """Write the compare.json of a comparison that begins: only its modes. `write` replaces it at the end."""
    write_json(path, [{"mode": name} for name in names])


def compare_runs(paths: list[Path], as_json: bool = False) -> str:
    """The text of eval.py --compare: tables with a row for each finished run among folders, and findings; or the same
    as JSON.

    Writes compare.md and, with matplotlib, pictures to the folder that holds all runs. Raises UserError.
    """
    finished, unfinished = find_runs(paths)
    if not finished:
        raise UserError(f"--compare {' '.join(map(str, paths))}: no finished run is there")
    out = Path(os.path.commonpath([folder.absolute().parent for folder in finished]))
    runs = []
    for folder in finished:
        name = folder.absolute().relative_to(out).as_posix()
        runs.append(load_run(folder, name, load_result(folder) | {"run": name}))
    groups = group_runs(runs)
    found = findings(groups)
    lines = [write_markdown(out, runs, groups, found, "run")]
    lines += [f"{folder} is left out: it has no result.json, so the run has not ended" for folder in unfinished]
    lines += draw(out, runs)
    if as_json:
        return json.dumps(with_findings(runs, found))
    return "\n".join(lines)


def with_findings(runs: list[Run], found: list[Finding]) -> list[dict[str, Any]]:
    """The results, each with the sentences about it."""
    results = []
    for run in runs:
        sentences = [finding.sentence for finding in found if run.name in finding.runs]
        results.append(run.result | {"findings": sentences})
    return results


def write_markdown(folder: Path, runs: list[Run], groups: list[Group], found: list[Finding], heading: str) -> str:
    """Write compare.md, the tables and the findings, and return its text. `heading` is that of the runs' names.

    Raises UserError.
    """
    names = [{"name": run.name} for run in runs]
    cost = [name | run.result | {"chosen_options": chosen_options(run)} for name, run in zip(names, runs, strict=True)]
    quality = [base_row(group, len(groups) > 1) for group in groups] + cost
    parts = [short_table(cost, heading, COST), short_table(quality, heading, QUALITY), legend(quality)]
    in_use = [use.values(run.result) for run in runs]
    if any(in_use):
        rows = [name | values for name, values in zip(names, in_use, strict=True)]
        parts.append(short_table(rows, heading, use.COLUMNS))
    if trials := [(run.name, trial) for run in runs for trial in run.trials]:
        parts.append(trials_table(trials))
    if of_several_sizes(runs):
        parts.append(size_table(runs))
    sentences = [finding.sentence for finding in found] + notes(runs, groups)
    parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "compare.md", text)
    return text


def chosen_options(run: Run) -> str | None:
    """The options that a search chose, without the learning rate, which has its own column."""
    chosen = next((trial for trial in run.trials if trial["chosen"]), {"options": {}})
    return option_words({name: value for name, value in chosen["options"].items() if name != "lr"}) or None


def base_row(group: Group, is_named: bool) -> dict[str, Any]:
    """The scores of the base of a group, by the names of a run's scores."""
    run = group.runs[0]
    row = {measure: estimate.value for (name, measure), estimate in group.estimates.items() if name is None}
    for name, value in run.result.items():
        if name.startswith("base_"):
            row[name.removeprefix("base_")] = value
    return row | {"name": f"base {run.base}" if is_named else "base"}


def short_table(rows: list[dict[str, Any]], heading: str, columns: Columns) -> str:
    """A table without the optional columns for which no row has a value."""
    shown = {name: column for name, column in columns.items()
             if name in NEEDED or any(row.get(name) is not None for row in rows)}
    return table(rows, {"name": (heading, str)} | shown)


def legend(rows: list[dict[str, Any]]) -> str:
    lines = [line for name, line in LEGENDS.items() if any(row.get(name) is not None for row in rows)]
    return " ".join([LEGEND, *lines])


def notes(runs: list[Run], groups: list[Group]) -> list[str]:
    """The limits of a comparison."""
    lines = []
    without = [run.name for run in runs if not run.rows and run.result["test_loss"] is not None]
    if without:
        lines.append(f"no intervals for {', '.join(without)}: there is no test_rows.jsonl, which older versions did "
                     "not write.")
    if len(groups) > 1:
        parts = " | ".join(", ".join(run.name for run in group.runs) for group in groups)
        lines.append(f"not ranked against each other, as base or test rows differ: {parts}.")
    if any(run.result["test_loss"] is None for run in runs):
        lines.append("not ranked: there are no test rows, so nothing says which run is better.")
    return lines


def draw(folder: Path, runs: list[Run]) -> list[str]:
    """Draw the pictures, and say in a line which files were written."""
    files = [folder / "compare.md"]
    try:
        plot.draw_runs(folder / "compare.png", folder, runs)
        files.append(folder / "compare.png")
        if of_several_sizes(runs):
            plot.draw_sizes(folder / "size.png", runs)
            files.append(folder / "size.png")
    except ModuleNotFoundError:
        return [f"written: {files[0]}; pip install matplotlib to have pictures drawn too"]
    return [f"written: {', '.join(map(str, files))}"]
