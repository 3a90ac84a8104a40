"""Runs side by side: one table, and sentences about the best runs and about problems.

A result is a run's result.json, see result.py.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from minift.errors import UserError
from minift.files.atomic import read_json, write_json, write_text
from minift.report import plot
from minift.report.table import format_bytes, table

four_digits = "{:.4f}".format
# The columns of the table: {name in result.json: (heading, function that formats the value)}
COLUMNS = {
    "mode": ("mode", str),
    "learning_rate": ("lr", "{:g}".format),
    "trainable_parameters": ("trainable", "{:,}".format),
    "trainable_share": ("share", "{:.2%}".format),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "predicted_peak_bytes": ("predicted", format_bytes),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "best_val_loss": ("val loss", four_digits),
    "test_loss": ("test loss", four_digits),
    "rougeL": ("ROUGE-L", four_digits),
    "exact_match": ("exact", four_digits),
    "forgetting": ("forgetting", "{:+.4f}".format),
    "tuned_bytes": ("tuned file", format_bytes),
}
LEGEND = ("Losses are in nats per target token. ROUGE-L compares words, exact is the share of completions "
          "equal to their reference; both ignore white space at the ends. Forgetting is the loss on general "
          "text after tuning minus before.")
# a result.json without these names cannot be compared
NEEDED = COLUMNS.keys() | {"base_test_loss", "base_rougeL", "best_step", "steps"}


class Finding(NamedTuple):
    """A sentence about a run."""

    run: str  # see run_name
    sentence: str


def run_name(result: dict[str, Any]) -> str:
    """The run's folder in eval.py --compare, else its mode: the runs of one train.py have different modes."""
    return result.get("run", result["mode"])


def is_comparable(results: list[dict[str, Any]]) -> bool:
    """Whether all runs have the same scores before tuning, and so the same base, test rows and dtype."""
    return len({(r["base_test_loss"], r["base_rougeL"]) for r in results}) == 1


def findings(results: list[dict[str, Any]]) -> list[Finding]:
    """Sentences about the best runs, then about the problems of each run."""
    found = []
    if is_comparable(results):
        found += rank(results)
        measured = [r for r in results if r["forgetting"] is not None]
        if measured:
            least = min(measured, key=lambda r: r["forgetting"])
            found.append(Finding(run_name(least), f"{run_name(least)} forgot the least: "
                                 f"{least['forgetting']:+.4f} nats per token on the general text."))
    for result in results:
        found += troubles(result)
    return found


def rank(results: list[dict[str, Any]]) -> list[Finding]:
    """The best and the cheapest run: by ROUGE-L if it can tell runs apart, else by test loss."""
    if any(r["test_loss"] is None for r in results):
        return []  # there are no test rows
    if any(r["rougeL"] is None for r in results):
        return rank_by_loss(results, "ROUGE is not measured, as the test rows have no prompts, or no words in their "
                            "references")
    if not any(r["rougeL"] for r in results):
        return rank_by_loss(results, "ROUGE-L is 0 in every run")
    return rank_by_rouge(results)


def rank_by_rouge(results: list[dict[str, Any]]) -> list[Finding]:
    """The run with the highest ROUGE-L, and the cheapest run within 1 % of it."""
    # of equal ROUGE-L, the lower test loss
    best = max(results, key=lambda r: (r["rougeL"], -r["test_loss"]))
    name = run_name(best)
    sentence = (f"{name} is the best: ROUGE-L {best['rougeL']:.3f}, test loss {best['test_loss']:.4f} "
                f"(base: {best['base_rougeL']:.3f}, {best['base_test_loss']:.4f}).")
    near = [r for r in results if r["rougeL"] >= 0.99 * best["rougeL"]]
    return [Finding(name, sentence), cheapest(near, "within 1 % of the best ROUGE-L")]


def rank_by_loss(results: list[dict[str, Any]], reason: str) -> list[Finding]:
    """The run with the lowest test loss, and the cheapest run within 1 % of it. `reason`: why not by ROUGE-L."""
    best = min(results, key=lambda r: r["test_loss"])
    name = run_name(best)
    sentence = (f"{name} is the best: test loss {best['test_loss']:.4f} (base: {best['base_test_loss']:.4f}). "
                f"{reason}, so the test loss decides.")
    near = [r for r in results if r["test_loss"] <= 1.01 * best["test_loss"]]
    return [Finding(name, sentence), cheapest(near, "within 1 % of the best test loss")]


def cheapest(results: list[dict[str, Any]], where: str) -> Finding:
    """The run that trains the fewest parameters; `where` tells among which runs."""
    result = min(results, key=lambda r: r["trainable_parameters"])
    name = run_name(result)
    return Finding(name, f"{name} is the cheapest {where}: it trains {result['trainable_share']:.2%} of the "
                   f"parameters, and its file takes {format_bytes(result['tuned_bytes'])}.")


def troubles(result: dict[str, Any]) -> list[Finding]:
    """The problems of a run, and what to try."""
    name = run_name(result)
    found = []
    if result["best_step"] == 0:
        found.append(Finding(name, f"{name} did not beat its start: no validation after it had a lower loss, so the "
                             "parameters of step 0 were kept: try another --lr or more --steps."))
    elif result["test_loss"] is not None and result["test_loss"] >= result["base_test_loss"]:
        found.append(Finding(name, f"{name} did not beat the base: try another --lr or more --steps."))
    elif result["best_step"] < result["steps"]:
        found.append(Finding(name, f"{name} overfitted: its validation loss was lowest at step "
                             f"{result['best_step']} of {result['steps']}, and those parameters were kept."))
    if count := result.get("references_over_limit"):  # a run of an older version has no such count
        found.append(Finding(name, f"{name} could not match {count} references, which are longer than "
                             "--max-new-tokens: raise it."))
    return found


def write(folder: Path, results: list[dict[str, Any]]) -> str:
    """Write compare.json, the results with the findings about each, and compare.md, whose text is returned.

    Raises UserError.
    """
    found = findings(results)
    with_findings = []
    for result in results:
        sentences = [finding.sentence for finding in found if finding.run == run_name(result)]
        with_findings.append(result | {"findings": sentences})
    write_json(folder / "compare.json", with_findings)
    return write_markdown(folder, results, COLUMNS, found)


def write_modes(path: Path, names: list[str]) -> None:
    """Write the compare.json of a comparison that begins: only its modes. `write` replaces it at the end."""
    write_json(path, [{"mode": name} for name in names])


def write_markdown(folder: Path, results: list[dict[str, Any]], columns: Any, found: list[Finding]) -> str:
    """Write compare.md, the table and the findings, and return its text. Raises UserError."""
    sentences = [f"- {finding.sentence}" for finding in found]
    text = "\n".join([table(results, columns), "", LEGEND, "", *sentences, ""])
    write_text(folder / "compare.md", text)
    return text


def compare_runs(paths: list[Path]) -> str:
    """The text of eval.py --compare: a table with a row for each finished run among folders, and findings.

    Writes compare.md and, with matplotlib, compare.png to the folder that holds all runs. Raises UserError.
    """
    finished, unfinished = find_runs(paths)
    if not finished:
        raise UserError(f"--compare {' '.join(map(str, paths))}: no finished run is there")
    out = Path(os.path.commonpath([folder.absolute().parent for folder in finished]))
    results = []
    for folder in finished:
        name = folder.absolute().relative_to(out).as_posix()
        results.append(load_result(folder) | {"run": name})
    lines = [write_markdown(out, results, {"run": ("run", str)} | COLUMNS, findings(results))]
    for folder in unfinished:
        lines.append(f"{folder} is left out: it has no result.json, so the run has not ended")
    if not is_comparable(results):
        lines.append("not ranked: the bases score differently before tuning, so base, test rows or dtype "
                     "differ")
    if any(result["test_loss"] is None for result in results):
        lines.append("not ranked: there are no test rows, so nothing says which run is better")
    try:
        plot.draw_runs(out, results)
        lines.append(f"written: {out / 'compare.md'} and {out / 'compare.png'}")
    except ModuleNotFoundError:
        lines.append(f"written: {out / 'compare.md'}; pip install matplotlib to have compare.png drawn too")
    return "\n".join(lines)


def find_runs(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The finished and the unfinished runs, each once and in order. A folder is a run, or it holds runs."""
    finished: dict[Path, None] = {}  # a dictionary serves as a set that keeps its order
    unfinished: dict[Path, None] = {}
    for path in paths:
        if path.is_file():
            continue  # the shell's runs/* matches an older compare.md too
        inside = sorted(found.parent for found in path.glob("*/result.json"))
        for folder in inside or [path]:
            if (folder / "result.json").is_file():
                finished[folder] = None
            else:
                unfinished[folder] = None
    return list(finished), list(unfinished)


def load_result(folder: Path) -> dict[str, Any]:
    """The result.json of a run. Raises UserError if it is damaged or lacks a name."""
    path = folder / "result.json"
    result = read_json(path, dict)
    if missing := NEEDED - result.keys():
        raise UserError(f"{path} cannot be used: {', '.join(sorted(missing))} missing; leave this run out")
    return result
