"""The frame that benchmarks share: their options, and the line of facts above their tables."""

from dataclasses import asdict
from typing import Any, TypeVar

import torch

from minift.device import machine_name
from minift.options import Parser, add_options, resolve

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
