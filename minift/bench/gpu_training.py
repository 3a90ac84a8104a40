"""The stages "train" and "peer" of `python -m minift.bench gpu`: training steps of every mode, and the same steps with
transformers and PEFT."""

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from minift.bench import train
from minift.bench.gpu_checks import ROOT
from minift.bench.gpu_context import Context, Result
from minift.bench.models import SIZES
from minift.bench.train import TrainBenchOptions, count_tokens, random_steps
from minift.errors import UserError
from minift.graphs import check_graphs
from minift.modes import MODES
from minift.ops import attention, flash_attention, kernel_choice

# ---- training

@dataclass(frozen=True)
class TrainUnit:
    size: str
    mode: str
    batch: int
    kernel: str | None = None  # of mode lora
    graphs: str = "auto"
    ragged: bool = False
    padded: bool = False  # attention of padded rows, where packed rows are the default

    def __str__(self) -> str:
        words = [self.mode, self.kernel, self.size, f"{self.batch} rows", f"graphs {self.graphs}"]
        words += [word for word, given in (("ragged", self.ragged), ("padded attention", self.padded)) if given]
        return ", ".join(filter(None, words))


def train_units(dry: bool) -> dict[str, Any]:
    if dry:
        units = [TrainUnit("tiny", mode, 2, "torch" if mode == "lora" else None) for mode in MODES]
        units += [TrainUnit("tiny", "lora", 2, "auto", ragged=True, padded=True)]
    else:
        units = [TrainUnit("gpt2", "lora", batch, "auto") for batch in (8, 64)]
        units += [TrainUnit("gpt2", "lora", batch, kernel, graphs) for graphs in ("off", "on")
                  for kernel in kernel_choice.KERNELS for batch in (8, 64)]
        others = [mode for mode in MODES if mode != "lora"]
        units += [TrainUnit("gpt2", mode, 8) for mode in others]
        units += [TrainUnit("gpt2", "lora", batch, "auto", "off", ragged=True, padded=padded)
                  for batch in (8, 64) for padded in (False, True)]
        units += [TrainUnit("gpt2", "lora", batch, "auto", "on", ragged=True) for batch in (8, 64)]
        units += [TrainUnit("gpt2", mode, 64) for mode in others]
        for batch in (8, 64):
            for size in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
                units += [TrainUnit(size, "lora", batch, kernel) for kernel in ("auto", "torch")]
                units += [TrainUnit(size, mode, batch) for mode in others]
    return {str(unit): unit for unit in units}


def train_options(size: str, batch: int, ragged: bool, dry: bool) -> TrainBenchOptions:
    """Rows of 170 tokens that the model reads."""
    if dry:
        sizes = dict(tokens=20, targets=5, steps=2, dtype="fp32", device="cpu")
    else:
        sizes = dict(tokens=171, targets=27, steps=20, device="cuda")
    return TrainBenchOptions(size=size, batch=batch, ragged=ragged, **sizes)


@contextlib.contextmanager
def attention_of(padded: bool) -> Iterator[None]:
    """While entered, attention pads the rows if `padded`; otherwise it takes the fastest form of the device."""
    if padded:
        with mock.patch.object(attention, "takes_flash", lambda *_: False):
            yield
    else:
        yield


def attention_name(padded: bool, context: Context) -> str | None:
    """The form of attention that a GPU takes; None on a CPU."""
    if context.dry:
        return None
    has_packed = context.dtype in flash_attention.DTYPES and flash_attention.has_flash(context.device)
    return "packed" if has_packed and not padded else "padded"


def measure_training(unit: TrainUnit, context: Context) -> Iterator[Result]:
    if unit.kernel:
        kernel_choice.check_kernel(unit.kernel, context.device)
    options = train_options(unit.size, unit.batch, unit.ragged, context.dry)
    options = replace(options, mode=unit.mode, kernel=unit.kernel, graphs=unit.graphs)
    check_graphs(train.train_settings(options), SIZES[unit.size])
    chosen = train.mode_options(unit.mode, options)
    with attention_of(unit.padded):
        result = train.measure(unit.mode, chosen, options, context.dtype, context.device)
    share = result["flops_per_second"] / context.facts["flops_per_second"]
    yield {"table": "train", "size": unit.size, "batch": unit.batch, "rows": "ragged" if unit.ragged else "equal",
           "kernel": unit.kernel, "attention": attention_name(unit.padded, context),
           "product_share": share} | result


# ---- beside transformers and PEFT

@dataclass(frozen=True)
class PeerUnit:
    size: str
    mode: str
    batch: int
    ragged: bool = False


def peer_units(dry: bool) -> dict[str, Any]:
    if dry:
        units = [PeerUnit("tiny", "lora", 2, ragged=True)]
    else:
        units = [PeerUnit("gpt2", mode, batch, ragged) for mode, batch, ragged in (
            ("lora", 8, False), ("lora", 64, False), ("lora", 8, True), ("full", 8, False), ("lora", 64, True),
            ("full", 64, False), ("selective", 8, False), ("prompt", 8, False))]
    return {f"{unit.mode}, {unit.batch} rows{', ragged' if unit.ragged else ''}": unit for unit in units}


STACKS = {"stack": [], "stack, no cuDNN": ["--no-cudnn"], "stack, dropout 0": ["--model-dropout", "0"]}
PEER_OPTIONS = {  # the same parameters as in usual_stack.py
    "lora": {"targets": "q,k,v", "rank": 8, "alpha": 16.0},
    "selective": {"train": "top:2,final"},
    "prompt": {"prompt_tokens": 20},
    "full": {},
}


def measure_peer(unit: PeerUnit, context: Context) -> Iterator[Result]:
    """minift and the usual stack on the same rows, first minift."""
    options = train_options(unit.size, unit.batch, unit.ragged, context.dry)
    chosen = MODES[unit.mode].Options(**PEER_OPTIONS[unit.mode])
    common = {"table": "peer", "mode": unit.mode, "batch": unit.batch, "rows": "ragged" if unit.ragged else "equal"}
    ours = train.measure(unit.mode, chosen, options, context.dtype, context.device)
    rate = ours["tokens_per_second"]
    figures = {name: ours[name] for name in ("tokens_per_second", "first_ms", "peak_memory_bytes")}
    yield common | {"program": "minift"} | figures
    if not all(importlib.util.find_spec(package) for package in ("transformers", "peft")):
        raise UserError("transformers and peft are not installed: minift alone is measured")
    for program, flags in list(STACKS.items())[: 1 if context.dry else None]:
        stack = run_stack(unit, options, flags, context)
        yield common | {"program": program, "times": rate / stack["tokens_per_second"]} | stack


def run_stack(unit: PeerUnit, options: TrainBenchOptions, flags: list[str], context: Context) -> Result:
    """usual_stack.py in a process of its own, on the rows of bench train. Raises UserError with its last line."""
    steps = random_steps(options, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.json"
        # on a GPU the third pass is timed, as that of minift
        passes = 1 if context.dry else 3
        batches = [[{"ids": row.ids, "spans": row.spans} for row in rows] for rows in passes * steps]
        path.write_text(json.dumps(batches))
        command = [sys.executable, "-m", "minift.bench.usual_stack", "--size", unit.size, "--batches", str(path),
                   "--mode", unit.mode, "--dtype", "fp32" if context.dry else "bf16", "--lr", "1e-4", "--device",
                   context.device.type, *flags]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise UserError((ended.stderr.strip().splitlines() or ["no message"])[-1])
    measured = json.loads(ended.stdout.splitlines()[-1])
    first, last = measured["seconds"][: len(steps)], measured["seconds"][-len(steps) :]
    rates = [count_tokens(rows) / seconds for rows, seconds in zip(steps, last, strict=True)]
    return {"tokens_per_second": statistics.median(rates[train.WARMUP :]),
            "first_ms": statistics.median(first[train.WARMUP :]) * 1e3,
            "peak_memory_bytes": measured["peak_memory_bytes"]}
