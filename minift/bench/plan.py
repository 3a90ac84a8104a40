"""python -m minift.bench plan: the peak memory that --plan predicts, beside the one that train.py measures.

Each run is a process of its own with a few steps of ragged rows: the embedded base on its pairs, and models with random
weights on embedded dialogues of the lengths of SAMSum or of DialogSum; or --model on --data.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minift import modes
from minift.bench.command import print_facts, print_results, read_options
from minift.bench.peer import TRAIN, run_python
from minift.bench.samples import write_base, write_rows
from minift.errors import UserError
from minift.files.atomic import read_json
from minift.files.hub import PRESETS
from minift.modes import MODES
from minift.options import option
from minift.report.table import format_bytes

PROMPT_TOKENS = {"samsum": 145, "dialogsum": 220}  # the mean of a prompt
COLUMNS = {
    "base": ("base", str),
    "rows": ("rows", str),
    "mode": ("mode", str),
    "dtype": ("dtype", str),
    "predicted": ("predicted", format_bytes),
    "measured": ("measured", format_bytes),
    "difference": ("measured is", "{:+.1%}".format),
}
WIDTHS = [9, 9, 9, 5, 9, 9, 11]


@dataclass(frozen=True)
class PlanBenchOptions:
    size: str = option("gpt2", "size of the model with random weights", choices=tuple(PRESETS))
    model: str | None = option(None, "measure this Hugging Face folder instead; needs --data")
    data: str | None = option(None, "rows to learn, as in train.py; needs --model")
    mode: str = option("all", f"{', '.join(MODES)}, a comma list of them, or all")
    dtype: str = option("fp32,bf16", "fp32, bf16, or both with a comma between them")
    batch: int = option(8, "rows in a step", least=1)
    steps: int = option(30, "steps of each run", least=1)


def bench_plan(arguments: list[str]) -> None:
    options = read_options("plan", __doc__, PlanBenchOptions, arguments)
    if (options.model is None) != (options.data is None):
        raise UserError("--model and --data belong together: give both, or none")
    facts = print_facts(options, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        print_results(measure_all(options, Path(folder)), facts, COLUMNS, WIDTHS)


def measure_all(options: PlanBenchOptions, folder: Path) -> Iterator[dict[str, Any]]:
    for base, rows, flags in cases(options, folder):
        for mode in modes.parse_modes(options.mode):
            for dtype in options.dtype.split(","):
                run = measure([*flags, "--mode", mode, "--dtype", dtype], options, folder / "run")
                yield {"base": base, "rows": rows, "mode": mode, "dtype": dtype} | run


def cases(options: PlanBenchOptions, folder: Path) -> list[tuple[str, str, list[str]]]:
    """The name of a base, the name of its rows, and the flags of train.py for both."""
    if options.model is not None:
        return [(Path(options.model).name, Path(options.data).name, ["--model", options.model, "--data", options.data])]
    write_base(folder / "base", options.size)
    found = [("embedded", "embedded", [])]
    for name, tokens in PROMPT_TOKENS.items():
        path = folder / f"{name}.jsonl"
        write_rows(path, 2 * options.batch * options.steps + 50, tokens)
        found.append((options.size, name, ["--model", str(folder / "base"), "--data", str(path)]))
    return found


def measure(flags: list[str], options: PlanBenchOptions, out: Path) -> dict[str, Any]:
    """Both peaks of one run in bytes, and the measured one over the predicted one, minus 1."""
    run_python([str(TRAIN), *flags, "--device", "cpu", "--batch", str(options.batch), "--steps", str(options.steps),
                "--val-rows", "20", "--test-rows", "1", "--max-new-tokens", "1", "--out", str(out), "--overwrite"])
    result = read_json(out / "result.json", dict)
    predicted, measured = result["predicted_peak_bytes"], result["peak_memory_bytes"]
    return {"predicted": predicted, "measured": measured, "difference": measured / predicted - 1}
