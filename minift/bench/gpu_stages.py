"""The stages of `python -m minift.bench gpu`, in order. A stage has units, the most important first, and a function
that measures one unit and yields its results. Each result names its table of report.TABLES.

Every stage has two sizes: that of the half hour on a GPU, and a tiny one for --dry on a CPU.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from minift.bench import ceilings, decode, kernels, train
from minift.bench.gpu_checks import ROOT, checks
from minift.bench.layers import OUR_KERNELS, Case, find_rows
from minift.bench.models import SIZES
from minift.bench.train import TrainBenchOptions, count_tokens, random_steps
from minift.device import choose_dtype, machine_name
from minift.errors import UserError
from minift.graphs import check_graphs
from minift.modes import MODES
from minift.ops import attention, flash_attention, kernel_choice
from minift.ops.kernel_choice import RULE_FILE, gpu_generation, read_rule, why_no_triton, write_rule

Result = dict[str, Any]
Run = Callable[[Any, "Context"], Iterator[Result]]


@dataclass(frozen=True)
class Context:
    """The half hour's settings, and the results of the stages before this one."""

    dry: bool
    folder: Path  # of the report
    results: tuple[Result, ...] = ()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else choose_dtype("auto", self.device)

    @property
    def facts(self) -> Result:
        """The results of the stage "machine", by name."""
        return {result["fact"]: result["number"] for result in self.results if result["table"] == "machine"}


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    weight: float  # the stage's part of the time that is left, relative to those of later stages
    units: Callable[[bool], dict[str, Any]]  # dry -> {name of a unit: its settings}
    run: Run
    silence: float = 120.0  # seconds without a result after which a unit is given up


# ---- the machine

def machine_units(dry: bool) -> dict[str, Any]:
    return {"versions": "versions", "rate of products": "products", "rate of a copy": "copy"}


def measure_machine(unit: str, context: Context) -> Iterator[Result]:
    device = context.device

    def fact(name: str, value: str, number: float | None = None) -> Result:
        return {"table": "machine", "fact": name, "value": value, "number": number}

    if unit == "versions":
        yield fact("machine", machine_name(device))
        yield fact("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
        for package in ("triton", "transformers", "peft"):
            yield fact(package, package_version(package))
        yield fact("Triton kernels", why_no_triton(device) or "run here")
        yield fact("Python", f"{platform.python_version()}, {os.cpu_count()} cores")
        if query := shutil.which("nvidia-smi"):
            names = "driver_version,memory.total,power.limit,clocks.max.sm,temperature.gpu"
            ended = subprocess.run([query, f"--query-gpu={names}", "--format=csv,noheader"], capture_output=True,
                                   text=True, timeout=30)
            yield fact(f"nvidia-smi: {names}", ended.stdout.strip() or ended.stderr.strip())
    elif unit == "products":
        rate = ceilings.matmul_rate(context.dtype, device, (128,) if context.dry else None)
        yield fact("flops_per_second", f"{rate / 1e12:.4g} TFLOP/s, the fastest of square products", rate)
    else:
        cache = ceilings.cache_bytes(device)
        rate = ceilings.copy_rate(device, 2**20 if context.dry else None)
        yield fact("bytes_per_second", f"{rate / 1e9:.4g} GB/s read and written, a large copy", rate)
        yield fact("ring_bytes", f"twice {cache / 2**20:.0f} MiB, the last-level cache", 2 * cache)


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- correctness

def check_units(dry: bool) -> dict[str, Any]:
    device = torch.device("cpu" if dry else "cuda")
    return {name: name for name in checks(device, dry)}


def run_check(unit: str, context: Context) -> Iterator[Result]:
    yield from checks(context.device, context.dry)[unit]()


# ---- the low-rank update of one layer, and the rule of --kernel auto

@dataclass(frozen=True)
class LayerUnit:
    case: Case
    rows: tuple[str, ...]
    parts: bool = False


def layer_units(dry: bool) -> dict[str, Any]:
    if dry:
        return {str(case): LayerUnit(case, ("frozen", "eager", "torch", "triton"), parts=True)
                for case in (Case(24, 36, 40, 3, 0.1, "qv"), Case(24, 24, 40, 3, 0.0))}
    rows = ("frozen", "eager", *OUR_KERNELS)
    shapes = ((768, 2304, "qkv"), (768, 3072, ""), (4096, 4096, ""), (3072, 768, ""), (768, 768, ""), (768, 2304, "qv"))
    units = []
    # 8,192 tokens and rank 16 first; ranks 8 and 16 take the same tiles
    for M, rank, (K, N, parts), dropout in itertools.product((8192, 2048, 16384), (16, 8), shapes, (0.0, 0.1)):
        units.append(LayerUnit(Case(K, N, M, rank, dropout, parts), rows, parts=rank == 16))
    for K, N in ((768, 3072), (4096, 4096)):  # the baselines that take long to compile or to import, last
        units.append(LayerUnit(Case(K, N, 8192, 16, 0.0), ("frozen", "eager", "torch", "compile", "peft")))
    return {f"{unit.case}{', torch.compile and PEFT' if 'compile' in unit.rows else ''}": unit for unit in units}


def measure_layer(unit: LayerUnit, context: Context) -> Iterator[Result]:
    device, facts, samples = context.device, context.facts, 3 if context.dry else 9
    rows, _ = find_rows(list(unit.rows), device)
    for result in kernels.measure(unit.case, rows, samples, facts, context.dtype, device):
        yield {"table": "layers"} | result
    if unit.parts:
        for result in kernels.measure_parts(unit.case, samples, facts, context.dtype, device):
            yield {"table": "parts"} | result


def rule_units(dry: bool) -> dict[str, Any]:
    return {"the rule of --kernel auto": None}


def make_rule(unit: None, context: Context) -> Iterator[Result]:
    """Write kernel_rule.json beside the report, and on a GPU that of this project, which the next stages follow."""
    path = context.folder / RULE_FILE.name
    shutil.copy(RULE_FILE, path)
    layers = [result for result in context.results if result["table"] == "layers"]
    if context.dry:  # eager times in the place of those of graphs, which a CPU has not
        layers += [result | {"launch": "graph"} for result in layers]
    gpu = "dry" if context.dry else gpu_generation(context.device)
    write_rule(path, kernels.rule_measurements(layers, gpu))
    if not context.dry:
        shutil.copy(path, RULE_FILE)
        read_rule.cache_clear()
    for name, measured in read_rule(path).items():
        yield {"table": "rule", "class": name} | measured


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


# ---- decoding

def decode_units(dry: bool) -> dict[str, Any]:
    if dry:
        units = [decode.DecodeOptions("tiny", "lora", 2, prompt_tokens=10, new_tokens=4, repeats=1)]
    else:
        units = [decode.DecodeOptions("gpt2", "full", batch, repeats=3) for batch in (1, 16, 64)]
        units += [decode.DecodeOptions(size, mode, 16, repeats=3)
                  for size, mode in (("gpt2", "lora"), ("gpt2-xl", "full"))]
    return {f"{unit.mode}, {unit.size}, {unit.batch} rows": unit for unit in units}


def measure_decoding(unit: decode.DecodeOptions, context: Context) -> Iterator[Result]:
    result = decode.measure(unit.mode, unit, context.dtype, context.device)
    yield {"table": "decode", "size": unit.size, "batch": unit.batch} | result


STAGES = (
    Stage("machine", "The machine", 1, machine_units, measure_machine),
    Stage("checks", "Correctness on the device", 6, check_units, run_check, silence=300),
    Stage("kernels", "The low-rank update of one layer", 9, layer_units, measure_layer, silence=240),
    Stage("rule", "The rule of --kernel auto", 0.5, rule_units, make_rule),
    Stage("train", "Training", 8, train_units, measure_training),
    Stage("peer", "Beside transformers and PEFT", 5, peer_units, measure_peer),
    Stage("decode", "Decoding", 2, decode_units, measure_decoding),
)
