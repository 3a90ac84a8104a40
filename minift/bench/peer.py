"""python -m minift.bench peer: train.py beside transformers and PEFT, on the same rows in the same order.

The programs run in turn, round after round, each in a process of its own, so that a machine whose speed drifts slows
all of them down. The base has random weights and the rows are embedded dialogues of the lengths of SAMSum, unless
--model and --data say otherwise. transformers trains GPT-2 with a dropout of 0.1, minift without: both are measured.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minift import modes
from minift.bench.command import print_facts, print_results, read_options
from minift.bench.samples import write_base, write_rows
from minift.data.dataset import load_examples
from minift.device import choose_device
from minift.errors import UserError
from minift.files import weights
from minift.files.atomic import read_json
from minift.files.hub import PRESETS
from minift.options import option
from minift.report.table import format_bytes
from minift.run import config as configuration
from minift.run.folder import read_metrics
from minift.training import iterate_steps

TRAIN = Path(__file__).parents[2] / "train.py"
WARMUP = 2  # steps that are not timed
LEARNING_RATE = 2e-4
MODE_FLAGS = {  # the same parameters as in usual_stack.py
    "full": [],
    "selective": ["--train", "top:2,final"],
    "lora": ["--rank", "8", "--alpha", "16", "--targets", "q,k,v"],
    "prompt": ["--prompt-tokens", "20"],
}
COLUMNS = {
    "mode": ("mode", str),
    "dtype": ("dtype", str),
    "program": ("program", str),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "slowest": ("min", "{:,.0f}".format),
    "fastest": ("max", "{:,.0f}".format),
    "times": ("minift is faster", "{:.1f} times".format),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "memory_ratio": ("minift / this", "{:.2f}".format),
    "last_loss": ("last loss", "{:.4f}".format),
}
WIDTHS = [9, 5, 20, 8, 6, 6, 16, 11, 13, 9]


@dataclass(frozen=True)
class PeerOptions:
    size: str = option("gpt2", "size of the model with random weights", choices=tuple(PRESETS))
    model: str | None = option(None, "a Hugging Face folder instead of random weights")
    data: str | None = option(None, "rows to learn, as in train.py (default: embedded dialogues)")
    tokens: int = option(145, "mean tokens of a prompt, without --data", least=1)
    mode: str = option("lora", f"{', '.join(MODE_FLAGS)}, or a comma list of them")
    dtype: str = option("bf16", "fp32, bf16, or both with a comma between them")
    batch: int = option(8, "rows in a step", least=1)
    steps: int = option(8, f"steps of each run, of which the first {WARMUP} are not timed", least=WARMUP + 1)
    rounds: int = option(2, "runs of each program, in turn", least=1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    compile: bool = option(False, "measure the stack with torch.compile too (takes minutes to compile)")


def bench_peer(arguments: list[str]) -> None:
    options = read_options("peer", __doc__, PeerOptions, arguments)
    chosen, dtypes = modes.parse_modes(options.mode), options.dtype.split(",")
    if others := set(chosen) - MODE_FLAGS.keys():
        raise UserError(f"--mode {options.mode}: PEFT trains no GPT-2 in mode {', '.join(sorted(others))}; it has "
                        f"{', '.join(MODE_FLAGS)}")
    if others := set(dtypes) - {"fp32", "bf16"}:
        raise UserError(f"--dtype {options.dtype}: must be fp32, bf16 or fp32,bf16")
    has_stack = all(importlib.util.find_spec(package) for package in ("transformers", "peft"))
    device = choose_device(options.device)
    facts = print_facts(options, device)
    if not has_stack:
        print("transformers and peft are not installed: train.py alone is measured\n")
    options = replace(options, device=device.type)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            write_base(Path(folder) / "base", options.size)
        if options.data is None:
            write_rows(Path(folder) / "rows.jsonl", 200 + options.batch * options.steps, options.tokens)
        results = (result for mode in chosen for dtype in dtypes
                   for result in measure(mode, dtype, options, Path(folder), has_stack))
        print_results(results, facts, COLUMNS, WIDTHS)


def measure(mode: str, dtype: str, options: PeerOptions, folder: Path, has_stack: bool) -> list[dict[str, Any]]:
    """The figures of every program for one mode and dtype, minift first."""
    model, data = options.model or folder / "base", options.data or folder / "rows.jsonl"
    flags = ["--model", str(model), "--data", str(data), "--mode", mode, *MODE_FLAGS[mode], "--dtype", dtype,
             "--device", options.device, "--order", "file",
             "--batch", str(options.batch), "--steps", str(options.steps),
             "--eval-every", str(options.steps), "--lr", str(LEARNING_RATE), "--weight-decay", "0",
             "--schedule", "constant", "--warmup-ratio", "0", "--max-length", "512", "--val-rows", "1",
             "--test-rows", "1", "--max-new-tokens", "1"]
    tokens = write_batches(flags, folder / "batches.json")
    programs = {"minift": []}
    if has_stack:
        programs |= {"stack": [], "stack, dropout 0": ["--model-dropout", "0"]}
    if has_stack and options.compile:
        programs |= {"stack, compiled": ["--compile"]}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, more in programs.items():
            if name == "minift":
                runs[name].append(run_minift(flags, folder / "run"))
            else:
                command = ["-m", "minift.bench.usual_stack", "--batches", str(folder / "batches.json"), "--model",
                           str(model), "--mode", mode, "--dtype", dtype, "--lr", str(LEARNING_RATE), "--device",
                           options.device, *more]
                runs[name].append(json.loads(run_python(command).splitlines()[-1]))
    results = []
    for name, of_program in runs.items():
        rates = [sum(tokens[WARMUP:]) / sum(run["seconds"][WARMUP:]) for run in of_program]
        result = {"mode": mode, "dtype": dtype, "program": name, "tokens_per_second": statistics.median(rates),
                  "slowest": min(rates), "fastest": max(rates), "last_loss": of_program[-1]["losses"][-1],
                  "peak_memory_bytes": max(run["peak_memory_bytes"] for run in of_program)}
        if results:
            result["times"] = results[0]["tokens_per_second"] / result["tokens_per_second"]
            result["memory_ratio"] = results[0]["peak_memory_bytes"] / result["peak_memory_bytes"]
        results.append(result)
    return results


def write_batches(flags: list[str], path: Path) -> list[int]:
    """Write the batches that train.py reads with these flags; returns the tokens of each step."""
    config = configuration.parse(flags, "")[0]
    base = weights.load_on_meta(config.train.model)
    room = base.model.config.n_positions
    rows, *_ = load_examples(config.data, config.train.seed, base.tokenizer, weights.required_eos(base), room,
                            {"train": None})
    batches = []
    for micro_batches in iterate_steps(rows["train"], config.train, 0):
        batches.append([{"ids": row.ids, "spans": row.spans} for row in micro_batches[0]])
        if len(batches) == config.train.steps:
            break
    path.write_text(json.dumps(batches), encoding="utf-8")
    return [sum(len(row["ids"]) for row in rows) for rows in batches]


def run_minift(flags: list[str], out: Path) -> dict[str, Any]:
    """train.py in a process of its own: the seconds and the loss of each step, and the peak memory."""
    run_python([str(TRAIN), *flags, "--out", str(out), "--overwrite"])
    steps = [line for line in read_metrics(out) if "loss" in line]
    result = read_json(out / "result.json", dict)
    return {"seconds": [line["seconds"] for line in steps], "losses": [line["loss"] for line in steps],
            "peak_memory_bytes": result["peak_memory_bytes"]}


def run_python(command: list[str]) -> str:
    """The output of a Python process. Raises UserError with its last line if it fails."""
    paths = os.environ | {"PYTHONPATH": str(TRAIN.parent)}  # the process finds minift in any folder
    ended = subprocess.run([sys.executable, *command], env=paths, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"python {' '.join(command[:2])} failed: {last}")
    return ended.stdout
