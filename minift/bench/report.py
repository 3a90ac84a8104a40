"""The report of `python -m minift.bench gpu`: one Markdown file and one JSON file, both written after every line."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minift.bench import kernels, parts
from minift.bench.targets import TARGET_COLUMNS, readme_lines, targets
from minift.files.atomic import write_json, write_text
from minift.report.table import Columns, format_bytes, table, table_head, table_row

Result = dict[str, Any]
DRY = "A dry run on tiny shapes: its figures mean nothing."
SHAPE = {
    "K": ("K", str),
    "N": ("N", str),
    "parts": ("parts", str),
    "M": ("tokens", "{:,}".format),
    "rank": ("rank", str),
    "dropout": ("dropout", "{:g}".format),
}
# {name of a table, which each result gives: its columns}
TABLES: dict[str, Columns] = {
    "machine": {"fact": ("fact", str), "value": ("value", str)},
    "checks": {
        "check": ("check", str),
        "error": ("error", "{:.1e}".format),
        "bound": ("bound", "{:.0e}".format),
        "verdict": ("verdict", str),
    },
    "layers": {"row": kernels.COLUMNS["row"]} | SHAPE | kernels.COLUMNS,
    "parts": {"part": parts.COLUMNS["part"]} | SHAPE | parts.COLUMNS,
    "rule": {"class": ("class of layers", str), "kernel": ("auto takes", str)} | {
        name: (name.replace("_", " "), "{:.3f}".format) for name in ("graph_ratio", "eager_ratio")},
    "train": {
        "mode": ("mode", str),
        "size": ("size", str),
        "batch": ("rows", str),
        "rows": ("lengths", str),
        "kernel": ("kernel", str),
        "attention": ("attention", str),
        "graphs": ("graphs", str),
        "step_ms": ("step ms", "{:.2f}".format),
        "first_ms": ("of a new shape", "{:.2f}".format),
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
        "peak_memory_bytes": ("peak memory", format_bytes),
        "product_share": ("of product rate", "{:.0%}".format),
    },
    "peer": {
        "mode": ("mode", str),
        "batch": ("rows", str),
        "rows": ("lengths", str),
        "program": ("program", str),
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
        "first_ms": ("ms of a new shape", "{:.1f}".format),
        "peak_memory_bytes": ("peak memory", format_bytes),
        "times": ("minift is faster", "{:.1f} times".format),
    },
    "decode": {
        "mode": ("mode", str),
        "size": ("size", str),
        "batch": ("rows", str),
        "first_token_ms": ("first token ms", "{:.1f}".format),
        "new_tokens_per_second": ("new tokens/s", "{:,.0f}".format),
        "peak_memory_bytes": ("peak memory", format_bytes),
    },
}


@dataclass
class Section:
    """A stage of the half hour: its results, the units that failed as (unit, reason), and those not measured."""

    title: str
    results: list[Result] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    not_measured: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


class Report:
    """The sections, and the two files in `folder`. Every change is written at once."""

    def __init__(self, folder: Path, dry: bool, titles: dict[str, str]):
        """titles: {name of a stage: its title}"""
        self.folder, self.dry = folder, dry
        self.sections = {name: Section(title) for name, title in titles.items()}
        self.printed_table = ""
        self.write()

    @property
    def results(self) -> list[Result]:
        return [result for section in self.sections.values() for result in section.results]

    def add(self, stage: str, result: Result) -> None:
        """A result, which is printed too. Its "table" is a name of TABLES."""
        self.sections[stage].results.append(result)
        self.print_line(result)
        self.write()

    def add_failure(self, stage: str, unit: str, reason: str) -> None:
        self.sections[stage].failed.append((unit, reason))
        print(f"failed: {unit}: {reason}", flush=True)
        self.write()

    def add_not_measured(self, stage: str, units: Iterable[str], reason: str) -> None:
        for unit in units:
            self.sections[stage].not_measured.append((unit, reason))
            print(f"not measured: {unit}: {reason}", flush=True)
        self.write()

    def print_line(self, result: Result) -> None:
        columns = TABLES[result["table"]]
        widths = [max(len(heading), 6) for heading, _ in columns.values()]
        widths[0] = 24
        if result["table"] != self.printed_table:
            print(f"\n{table_head(columns, widths)}")
            self.printed_table = result["table"]
        print(table_row(result, columns, widths), flush=True)

    def write(self) -> None:
        sections = {name: asdict(section) for name, section in self.sections.items()}
        write_json(self.folder / "report.json", {"dry": self.dry, "targets": targets(self.results), "stages": sections})
        write_text(self.folder / "report.md", self.markdown())

    def markdown(self) -> str:
        lines = ["# minift on a GPU", ""]
        if self.dry:
            lines += [f"**{DRY}**", ""]
        lines += ["## Targets", "", table(targets(self.results), TARGET_COLUMNS), ""]
        for section in self.sections.values():
            lines += [f"## {section.title}", "", f"{section.seconds:.0f} seconds", ""]
            for name, columns in TABLES.items():
                if found := [result for result in section.results if result["table"] == name]:
                    lines += [table(found, columns), ""]
            lines += [f"- failed: {unit}: {reason}" for unit, reason in section.failed]
            lines += [f"- not measured: {unit}: {reason}" for unit, reason in section.not_measured]
            lines.append("")
        lines += ["## Lines for the README", "", *readme_lines(self.results), ""]
        return "\n".join(lines)
