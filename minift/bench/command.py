"""The frame that benchmarks share: their options, and the line of facts above their tables."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TextIO, TypeVar

import torch

from minift.device import machine_name
from minift.errors import UserError
from minift.options import Parser, add_options, resolve
from minift.report.table import Columns, table_head, table_row

T = TypeVar("T")


def read_options(name: str, description: str, kind: type[T], arguments: list[str]) -> T:
    """The options of `python -m minift.bench NAME`. Raises UserError."""
    parser = Parser(prog=f"python -m minift.bench {name}", description=description)
    add_options(parser, "options", kind)
    return resolve(kind, parser.parse_args(arguments), {})[0]


def print_facts(options: Any, device: torch.device, **more: str) -> dict[str, Any]:
    """Print the machine and the options in one line; returned too, for the JSON object of the last line."""
    facts = {"machine": machine_name(device), "torch": torch.__version__, **asdict(options), **more}
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None) + "\n")
    return facts


def print_results(results: Iterable[dict[str, Any]], facts: dict[str, Any], columns: Columns, widths: list[int]
                  ) -> None:
    """Print a table, each row as its result comes, and in the last line one JSON object with all of them."""
    print(table_head(columns, widths))
    rows = []
    for result in results:
        rows.append(result)
        print(table_row(result, columns, widths), flush=True)
    print("\n" + json.dumps(facts | {"rows": rows}))


class LineFile:
    """A file of JSON lines that grows with each result, so that an interruption loses none; without a path, nothing is
    written. Raises UserError if it cannot be opened."""

    def __init__(self, path: str | None):
        self.file: TextIO | None = None
        if path is not None:
            try:
                self.file = open(path, "w", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--out {path}: cannot be written: {error.strerror}; name another file") from None

    def write(self, result: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(result) + "\n")
            self.file.flush()

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file:
            self.file.close()
