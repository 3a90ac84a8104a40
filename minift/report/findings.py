"""Sentences about runs: which are the best, as far as the noise allows to say it, and the problems of each."""

from collections.abc import Callable
from typing import NamedTuple

from minift.report.bootstrap import Interval
from minift.report.groups import Group
from minift.report.runs import Run
from minift.report.table import format_bytes


class Measure(NamedTuple):
    """How a score is read and printed."""

    heading: str
    sign: int  # 1: higher is better; -1: lower is better
    best: str  # says of a run that it is the first
    text: Callable[[float], str]


MEASURES = {
    "rougeL": Measure("ROUGE-L", 1, "has the highest ROUGE-L:", "{:.3f}".format),
    "test_loss": Measure("test loss", -1, "has the lowest test loss:", "{:.4f}".format),
    "unsupported": Measure("unsupported content", -1, "has the least unsupported content:", "{:.1%}".format),
    "forgetting": Measure("forgetting", -1, "forgot the least, in nats per token on the general text:",
                          "{:+.4f}".format),
}


class Finding(NamedTuple):
    """A sentence about some runs, by their names."""

    runs: tuple[str, ...]
    sentence: str


class Order(NamedTuple):
    """The runs of a group by one measure."""

    group: Group
    measure: str
    ranked: list[Run]  # best first
    differences: list[Interval | None]  # of each, minus the best; None: the noise is not known

    @property
    def is_known(self) -> bool:
        return None not in self.differences

    @property
    def equal(self) -> list[Run]:
        """The best run, and those that do not differ from it."""
        return [run for run, difference in zip(self.ranked, self.differences, strict=True)
                if difference is not None and contains_zero(difference)]


def findings(groups: list[Group]) -> list[Finding]:
    """Sentences about the best runs of each group, then about the problems of each run."""
    found = []
    for group in groups:
        where = f"on {group.runs[0].base}, " if len(groups) > 1 else ""
        found += [Finding(runs, where + sentence) for runs, sentence in rank(group)]
    for group in groups:
        for run in group.runs:
            found += troubles(run, group)
    return found


def rank(group: Group) -> list[Finding]:
    """Sentences about the runs by each measure. By the first, ROUGE-L or else the test loss, the cheapest of the best
    is named."""
    runs, found = group.runs, []
    if len(runs) < 2:
        return []
    measures, reason = choose_measures(runs)
    for measure in measures:
        order = make_order(group, runs, measure)
        finding = describe(order)
        if measure == measures[0]:
            found.append(Finding(finding.runs, finding.sentence + reason))
            found += cheapest(order.equal)
        else:
            found.append(finding)
    measured = [run for run in runs if run.result["forgetting"] is not None]
    if len(measured) > 1:
        found.append(describe(make_order(group, measured, "forgetting")))
    return found


def choose_measures(runs: list[Run]) -> tuple[list[str], str]:
    """The measures on test rows that all runs have; and why ROUGE-L is not the first of them."""
    if any(run.result["test_loss"] is None for run in runs):
        return [], ""  # there are no test rows
    measures, reason = ["rougeL", "test_loss"], ""
    if any(run.result["rougeL"] is None for run in runs):
        reason = "ROUGE is not measured, as the test rows have no prompts, or no words in their references"
    elif not any(run.result["rougeL"] for run in runs):
        reason = "ROUGE-L is 0 in every run"
    if reason:
        measures, reason = ["test_loss"], f" {reason}, so the test loss decides."
    if all(run.result.get("unsupported") is not None for run in runs):
        measures.append("unsupported")
    return measures, reason


def make_order(group: Group, runs: list[Run], measure: str) -> Order:
    sign = MEASURES[measure].sign
    # of equal values, the lower test loss
    ranked = sorted(runs, key=lambda run: (-sign * run.result[measure], run.result["test_loss"] or 0.0))
    best = ranked[0]
    differences = [group.between(run, best, measure) for run in ranked[1:]]
    return Order(group, measure, ranked, [(0.0, 0.0), *differences])


def contains_zero(interval: Interval) -> bool:
    return interval[0] <= 0 <= interval[1]


def describe(order: Order) -> Finding:
    """The best run, or those that do not differ from the best, as a sentence."""
    measure, best = MEASURES[order.measure], order.ranked[0]
    base = best.result.get(f"base_{order.measure}")
    with_base = "" if base is None else f" (base: {measure.text(base)})"
    first = f"{best.name} {measure.best} {measure.text(best.result[order.measure])}{with_base}"
    if not order.is_known:
        reason = ("from one run each, so another seed may change it" if order.measure == "forgetting" else
                  "the noise of this order is not known")
        return Finding((best.name,), f"{first}; {reason}.")
    equal = order.equal
    names = tuple(run.name for run in equal)
    if len(equal) > 1:
        values = join([measure.text(run.result[order.measure]) for run in equal])
        return Finding(names, f"{join(names)} do not differ in {measure.heading} {sample(order)}: "
                       f"{values}{with_base}.")
    second, (least, most) = order.ranked[1], sorted(map(abs, order.differences[1]))
    value = measure.text(second.result[order.measure])
    more = "less" if measure.sign > 0 else "more"
    return Finding(names, f"{first}; the next, {second.name}, has {value}, {measure.text(least)} to "
                   f"{measure.text(most)} {more} (95 %).")


def sample(order: Order) -> str:
    """The noise that a comparison takes into account."""
    seeds = max(run.seeds for run in order.ranked)
    if order.measure == "forgetting":
        return f"over {seeds} seeds"
    rows = f"on these {order.group.rows:,} rows"
    return rows if seeds == 1 else f"{rows} and {seeds} seeds"


def join(names: tuple[str, ...] | list[str]) -> str:
    """a, b and c."""
    return ", ".join(names[:-1]) + f" and {names[-1]}"


def cheapest(runs: list[Run]) -> list[Finding]:
    """The run that trains the fewest parameters, of several that do not differ."""
    if len(runs) < 2:
        return []
    run = min(runs, key=lambda run: run.result["trainable_parameters"])
    return [Finding((run.name,), f"{run.name} is the cheapest of these: it trains {run.result['trainable_share']:.2%} "
                    f"of the parameters, and its file takes {format_bytes(run.result['tuned_bytes'])}.")]


def troubles(run: Run, group: Group) -> list[Finding]:
    """The problems of a run, and what to try."""
    name, result, sentences = run.name, run.result, []
    gain = group.between(run, None, "test_loss")
    if result["best_step"] == 0:
        sentences.append(f"{name} did not beat its start: no validation after it had a lower loss, so the parameters "
                         "of step 0 were kept: try another --lr or more --steps.")
    elif result["test_loss"] is not None and result["test_loss"] >= result["base_test_loss"]:
        sentences.append(f"{name} did not beat the base: try another --lr or more --steps.")
    elif gain is not None and contains_zero(gain):
        sentences.append(f"{name} does not differ from the base in test loss on these {group.rows:,} rows: try another "
                         "--lr, more --steps or more test rows.")
    elif result["best_step"] < result["steps"]:
        sentences.append(f"{name} overfitted: its validation loss was lowest at step {result['best_step']} of "
                         f"{result['steps']}, and those parameters were kept.")
    if count := result.get("references_over_limit"):  # a run of an older version has no such count
        sentences.append(f"{name} could not match {count} references, which are longer than --max-new-tokens: raise "
                         "it.")
    return [Finding((name,), sentence) for sentence in sentences]
