"""Runs that can be compared, and the 95 % intervals of their scores and differences."""

from dataclasses import dataclass

import numpy as np

from minift.report import bootstrap, test_rows
from minift.report.bootstrap import Estimate, Interval, Variance
from minift.report.runs import Run
from minift.report.test_rows import RowScores

SHARES = ("rougeL", "exact_match", "unsupported")  # measures from 0 to 1
SAME_BASE = 0.01  # of the base's losses; rounding in another dtype or batch changes less, another base more


@dataclass
class Group:
    """Runs on the same base and the same test rows. `estimates` has (name of a run, measure), with None for the base;
    it lacks runs without test_rows.jsonl."""

    runs: list[Run]
    estimates: dict[tuple[str | None, str], Estimate]

    @property
    def rows(self) -> int | None:
        """The number of test rows, where it is known."""
        return next((len(run.rows[0].where) for run in self.runs if run.rows), None)

    def between(self, run: Run, other: Run | None, measure: str) -> Interval | None:
        """The 95 % interval of a run's measure minus that of another run, or of the base; None if it is not known."""
        if measure == "forgetting":
            return forgetting_between(run, other)
        a = self.estimates.get((run.name, measure))
        b = self.estimates.get((other and other.name, measure))
        return bootstrap.interval(bootstrap.difference(a, b)) if a and b else None


def group_runs(runs: list[Run]) -> list[Group]:
    """The groups of comparable runs, in the order of their first runs; their results get intervals."""
    members: list[list[Run]] = []
    for run in runs:
        found = next((group for group in members if all(are_comparable(other, run) for other in group)), None)
        if found is None:
            members.append([run])
        else:
            found.append(run)
    groups = [Group(group, estimate_group(group)) for group in members]
    for group in groups:
        add_intervals(group)
    return groups


def are_comparable(a: Run, b: Run) -> bool:
    """Whether two runs have the same base and test rows. Older runs do if their bases have the same scores."""
    if not a.rows or not b.rows:
        return all(a.result[name] == b.result[name] for name in ("base_test_loss", "base_rougeL"))
    if not a.rows[0].same_rows(b.rows[0]):
        return False
    losses, others = a.rows[0].base["loss"], b.rows[0].base["loss"]
    return bool(np.abs(losses - others).sum() <= SAME_BASE * losses.sum())


def estimate_group(runs: list[Run]) -> dict[tuple[str | None, str], Estimate]:
    """Each measure of each run and of the base, where all seeds have it."""
    known = [run for run in runs if run.rows]
    terms = {}
    for measure in test_rows.MEASURES:
        if known:
            terms[None, measure] = stack_terms(known[0].rows[:1], measure, "base")
        for run in known:
            terms[run.name, measure] = stack_terms(run.rows, measure, "tuned")
    terms = {key: arrays for key, arrays in terms.items() if arrays[1].sum(1).all()}
    return bootstrap.estimate_all(terms) if terms else {}


def stack_terms(seeds: list[RowScores], measure: str, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators (S, R) of a measure."""
    pairs = [test_rows.terms(getattr(rows, model), measure) for rows in seeds]
    return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])


def add_intervals(group: Group) -> None:
    """Add NAME_interval and base_NAME_interval, [low, high], to the results, where they are known."""
    for (name, measure), estimate in group.estimates.items():
        found = bootstrap.interval(estimate)
        if found is not None and measure in SHARES:
            found = (max(0.0, found[0]), min(1.0, found[1]))  # that of several seeds is symmetric
        for run in group.runs:
            if name in (run.name, None) and found is not None:
                prefix = "base_" if name is None else ""
                run.result[f"{prefix}{measure}_interval"] = list(found)


def forgetting_between(run: Run, other: Run) -> Interval | None:
    """The interval of a difference in forgetting, from seeds alone: the general text has no rows."""
    variances = []
    for one in (run, other):
        deviation = one.result.get("forgetting_std")
        if deviation is None:
            return None
        variances.append(Variance(deviation**2 / one.seeds, one.seeds - 1))
    return bootstrap.t_interval(run.result["forgetting"] - other.result["forgetting"], tuple(variances))
