"""Finished runs, as their folders have them: result.json, test_rows.jsonl and trials.jsonl."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minift.report import test_rows
from minift.report.test_rows import RowScores
from minift.run.folder import read_trials


@dataclass
class Run:
    """A finished run. `name` is its folder in eval.py --compare, else its mode: those of one train.py differ."""

    name: str
    result: dict[str, Any]  # see result.py
    rows: list[RowScores] = field(default_factory=list)  # of each seed; [] if they are not known
    trials: list[dict[str, Any]] = field(default_factory=list)  # of the search for its options

    @property
    def seeds(self) -> int:
        return len(self.result.get("seeds") or [0])

    @property
    def base(self) -> str:
        """The name of its base, without folders."""
        return Path(str(self.result.get("base", "base"))).name


def load_run(folder: Path, name: str, result: dict[str, Any]) -> Run:
    """A run whose result.json was read. Raises UserError if another file is damaged."""
    folders = [folder]  # the first seed's
    folders += [folder / f"seed-{seed}" for seed in (result.get("seeds") or [])[1:]]
    rows = [test_rows.read(seed_folder) for seed_folder in folders]
    if None in rows or not all(one.same_rows(rows[0]) for one in rows):
        rows = []
    return Run(name, result, rows, read_trials(folder))


def find_runs(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The finished and the unfinished runs, each once and in order. A folder is a run, or it holds runs."""
    finished: dict[Path, None] = {}  # a dictionary serves as a set that keeps its order
    unfinished: dict[Path, None] = {}
    for path in paths:
        if path.is_file():
            continue  # the shell's runs/* matches an older compare.md too
        inside = sorted(found.parent for found in path.glob("*/result.json"))
        if (path / "result.json").is_file():
            finished[path] = None  # the runs inside are those of its other seeds
        elif inside:
            finished |= dict.fromkeys(inside)
        else:
            unfinished[path] = None
    return list(finished), list(unfinished)
