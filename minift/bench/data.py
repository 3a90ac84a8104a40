"""python -m minift.bench data: seconds and memory from a file to rows of tokens, for files of several sizes.

A row has two random dialogues of the embedded pairs and the summary of the second, some 800 bytes. A file is read for
the first time, and then from the cache where it is large enough for one. The last line is one JSON object.
"""

import json
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from minift.bench.command import print_facts, print_results, read_options
from minift.bench.samples import embedded_pairs
from minift.data.dataset import DataOptions, load_examples
from minift.data.row_cache import is_large
from minift.device import choose_device, peak_memory, reset_peak_memory
from minift.errors import UserError
from minift.files import weights
from minift.files.weights import Base
from minift.options import option, parse_int
from minift.report.table import format_bytes
from minift.run.config import TINY, TrainOptions

COLUMNS = {
    "rows": ("rows", "{:,}".format),
    "file_bytes": ("file", format_bytes),
    "train_tokens": ("training tokens", "{:,}".format),
    "seconds": ("first start, s", "{:.1f}".format),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "cached_seconds": ("from the cache, s", "{:.1f}".format),
    "cached_peak_memory_bytes": ("peak memory", format_bytes),
}
WIDTHS = [9, 9, 15, 14, 11, 17, 11]


@dataclass(frozen=True)
class BenchDataOptions:
    rows: str = option("1000,10000,100000,1000000", "rows of the files")
    model: str | None = option(None, "the base whose tokenizer is used (default: the embedded base)")
    seed: int = option(0, "seed of the texts", least=0)


def bench_data(arguments: list[str]) -> None:
    options = read_options("data", __doc__, BenchDataOptions, arguments)
    try:
        counts = [parse_int(count) for count in options.rows.split(",")]
    except ValueError:
        raise UserError(f"--rows {options.rows!r:.40}: must be numbers with commas between them") from None
    base = weights.load_on_meta(options.model or str(TINY))
    facts = print_facts(options, torch.device("cpu"))
    # its own cache, so that the user's stays as it is
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        path = Path(folder) / "rows.jsonl"
        print_results((measure(path, count, options.seed, base) for count in counts), facts, COLUMNS, WIDTHS)


def write_rows(path: Path, count: int, seed: int) -> None:
    pairs = embedded_pairs()
    generator = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            first, second = generator.choices(pairs, k=2)
            dialogue = f"{number}\n{first['dialogue']}\n{second['dialogue']}"
            file.write(json.dumps({"dialogue": dialogue, "summary": second["summary"]}) + "\n")


def measure(path: Path, count: int, seed: int, base: Base) -> dict[str, Any]:
    """The figures of a file with `count` rows, which is written first."""
    write_rows(path, count, seed)
    result = {"rows": count, "file_bytes": path.stat().st_size, "cached_seconds": None,
              "cached_peak_memory_bytes": None}
    for prefix in ("", "cached_") if is_large([path]) else ("",):
        device = choose_device("cpu")
        reset_peak_memory(device)
        start = time.perf_counter()
        rows, *_ = load_examples(DataOptions(data=str(path)), 0, base.tokenizer, weights.required_eos(base),
                                base.model.config.n_positions, TrainOptions().row_limits)
        result[f"{prefix}seconds"] = time.perf_counter() - start
        result[f"{prefix}peak_memory_bytes"] = peak_memory(device)
        result["train_tokens"] = int(rows["train"].lengths.sum())
    return result
