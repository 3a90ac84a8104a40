"""The stages of `python -m minift.bench gpu`, in order. A stage has units, the most important first, and a function
that measures one unit and yields its results. Each result names its table of report.TABLES.

Every stage has two sizes: that of the half hour on a GPU, and a tiny one for --dry on a CPU.
"""

import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from minift.bench import ceilings, decode, kernels
from minift.bench.gpu_checks import checks
from minift.bench.gpu_context import Context, Result
from minift.bench.gpu_training import measure_peer, measure_training, peer_units, train_units
from minift.bench.layers import OUR_KERNELS, Case, find_rows
from minift.device import machine_name
from minift.ops.kernel_choice import RULE_FILE, gpu_generation, read_rule, why_no_triton, write_rule

Run = Callable[[Any, Context], Iterator[Result]]


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
