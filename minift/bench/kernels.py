"""python -m minift.bench kernels: the low-rank update of one layer, forward and backward.

Implementations: the frozen linear layer (no update, so no other can be faster), eager PyTorch as in loralib, this
project's Function, torch.compile of the eager form, PEFT's layer if peft is installed, and the Triton kernels on a GPU.
Each is launched eagerly and, on a GPU, also replayed from a CUDA graph.

The layers and their inputs form a ring that is larger than the cache, so each pass reads from memory. Implementations
take turns, sample by sample. FLOPs and bytes are given relative to the rates of the machine, measured in the same run.
The last line is one JSON object.

On a CPU all cases take hours; the third line gives the least time. --shapes, --tokens and --ranks choose cases.
"""

import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minift.bench import ceilings
from minift.bench.layers import NAMES, Case, Layer, find_rows, make_ring, step_of
from minift.device import DEVICES, DTYPES, choose_device, choose_dtype, dtype_name, machine_name, time_call
from minift.errors import UserError
from minift.options import Parser, add_options, option, resolve
from minift.report.table import table_head, table_row

WARMUP = 3  # samples that are not counted
OTHERS = ("frozen", "eager", "function")  # the time of each implementation is given relative to these
QUICK = {"shapes": "768x768,768x3072", "tokens": "2048", "ranks": "8", "samples": 9}
COLUMNS = {
    "row": ("implementation", lambda row: NAMES[row]),
    "launch": ("launch", str),
    "ms": ("ms", "{:.3f}".format),
    "ms_min": ("min", "{:.3f}".format),
    "ms_max": ("max", "{:.3f}".format),
    "over_frozen": ("/ frozen", "{:.2f}".format),
    "over_eager": ("/ eager", "{:.2f}".format),
    "over_function": ("/ Function", "{:.2f}".format),
    "flop_share": ("FLOPs", "{:.0%}".format),
    "byte_share": ("bytes", "{:.0%}".format),
}
WIDTHS = [17, 6, 8, 8, 8, 8, 7, 10, 5, 5]


@dataclass(frozen=True)
class KernelOptions:
    quick: bool = option(False, "two shapes of GPT-2, 2,048 tokens, rank 8, without torch.compile on a CPU: "
                                "some 15 s on 2 cores")
    shapes: str = option("768x768,768x2304/qkv,768x2304/qv,768x3072,3072x768,1024x1024,1280x1280,1600x1600,"
                         "1600x6400,4096x4096,4096x11008", "inputs x outputs of the layers; /qv: a fused "
                         "matrix of three, of which q and v get an update")
    tokens: str = option("512,2048,8192,16384", "tokens in a batch")
    ranks: str = option("8,16,64", "ranks of the update")
    dropouts: str = option("0,0.1", "dropout on the update's input")
    samples: int = option(21, f"timed samples of each row, after {WARMUP} that are not", least=1)
    dtype: str = option("auto", "compute dtype; auto: bf16 where the hardware has it", choices=DTYPES)
    device: str = option("auto", "where to compute", choices=DEVICES)


def bench_kernels(arguments: list[str]) -> None:
    parser = Parser(prog="python -m minift.bench kernels", description=__doc__)
    add_options(parser, "options", KernelOptions)
    args = parser.parse_args(arguments)
    quick = {name: (value, "--quick") for name, value in QUICK.items()} if args.quick else {}
    options, _ = resolve(KernelOptions, args, quick)
    cases = parse_cases(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    torch.manual_seed(0)

    facts = measure_machine(options, dtype, device)
    names, missing = find_rows(options.quick, device)
    facts["not_measured"] = missing
    print(f"{facts['machine']}, torch {facts['torch']}, {facts['dtype']}; measured ceilings "
          f"{facts['flops_per_second'] / 1e12:.3g} TFLOP/s and {facts['bytes_per_second'] / 1e9:.3g} GB/s; "
          f"inputs rotate through {facts['ring_bytes'] / 2**20:.0f} MiB")
    print("; ".join(f"{NAMES[row]} is not measured: {reason}" for row, reason in missing.items()))
    if device.type == "cpu":
        flops = sum(case.work("function", dtype.itemsize)[0] for case in cases)
        seconds = flops * len(names) * (options.samples + WARMUP) / facts["flops_per_second"]
        print(f"{len(cases)} cases, at least {seconds / 60:.1f} minutes")

    results = []
    for case in cases:
        print(f"\n{case}\n\n{table_head(COLUMNS, WIDTHS)}")
        names_here = [name for name in names if name != "peft" or not case.parts]  # PEFT has no update of parts
        for result in measure(case, names_here, options.samples, facts, dtype, device):
            results.append(result)
            print(table_row(result, COLUMNS, WIDTHS), flush=True)
        if "compile" in names:
            torch._dynamo.reset()  # torch.compile stops compiling after a few shapes
    print("\n" + "\n".join(summary(results)))
    print(json.dumps(facts | {"rows": results}))


def measure_machine(options: KernelOptions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The machine, the options and the ceilings, for the JSON object."""
    return {"machine": machine_name(device), "torch": torch.__version__, **asdict(options),
            "dtype": dtype_name(dtype),
            "flops_per_second": ceilings.matmul_rate(dtype, device),
            "bytes_per_second": ceilings.copy_rate(device),
            "ring_bytes": 2 * ceilings.cache_bytes(device)}


def parse_cases(options: KernelOptions) -> list[Case]:
    """Every combination of the four lists. Raises UserError."""
    shapes = []
    for text in options.shapes.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:/(q?k?v?))?", text)
        if not match or (match[3] and int(match[2]) % 3):
            raise UserError(f"--shapes {options.shapes}: {text!r} is neither INPUTSxOUTPUTS nor "
                            "INPUTSxOUTPUTS/qv with three parts of equal size")
        shapes.append((int(match[1]), int(match[2]), match[3] or ""))
    tokens = parse_numbers("--tokens", options.tokens, int, 1)
    ranks = parse_numbers("--ranks", options.ranks, int, 1)
    dropouts = parse_numbers("--dropouts", options.dropouts, float, 0)
    if max(dropouts) >= 1:
        raise UserError(f"--dropouts {options.dropouts}: all must be below 1")
    return [Case(K, N, M, rank, dropout, parts) for (K, N, parts), M, rank, dropout
            in itertools.product(shapes, tokens, ranks, dropouts)]


def parse_numbers(flag: str, text: str, kind: type, least: float) -> list[Any]:
    """The numbers of a comma list. Raises UserError for other text, or numbers below `least`."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(value >= least for value in values):
        raise UserError(f"{flag} {text}: must be a comma list of numbers of at least {least}")
    return values


def measure(case: Case, names: list[str], samples: int, facts: dict[str, Any], dtype: torch.dtype,
            device: torch.device) -> Iterator[dict[str, Any]]:
    """The results of a case, one for each implementation and way to launch it."""
    ring = make_ring(case, dtype, device, facts["ring_bytes"])
    runs, passes = make_runs(case, names, ring, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for sample in range(WARMUP + samples):
        for key, run in runs.items():
            seconds = time_call(run, device) / passes
            if sample >= WARMUP:
                times[key].append(seconds)
    for (row, launch), taken in times.items():
        flops, nbytes = case.work(row, dtype.itemsize)
        median = statistics.median(taken)
        result = {
            "row": row,
            "launch": launch,
            **asdict(case),
            "ms": median * 1e3,
            "ms_min": min(taken) * 1e3,
            "ms_max": max(taken) * 1e3,
            "flop_share": flops / median / facts["flops_per_second"],
            "byte_share": nbytes / median / facts["bytes_per_second"],
        }
        for other in OTHERS:
            # ratios of samples that were measured one after the other: a busy moment of the machine slows both
            ratios = [a / b for a, b in zip(taken, times[other, launch], strict=True)]
            result[f"over_{other}"] = statistics.median(ratios)
        yield result


def make_runs(case: Case, names: list[str], ring: list[Layer], device: torch.device
              ) -> tuple[dict[tuple[str, str], Callable[[], None]], int]:
    """{(implementation, launch): function that runs one sample}, and the number of layers in a sample: on a GPU the
    full ring, since one layer is too short to be timed; on a CPU one layer, the next of the ring."""
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    next_layer = itertools.cycle(ring)  # shared by all implementations, or one would find its layer in the cache
    for name in names:
        step = step_of(name, case, ring)
        if device.type == "cuda":
            runs[name, "eager"] = lambda step=step: [step(layer) for layer in ring]
            runs[name, "graph"] = capture(step, ring)
        else:
            runs[name, "eager"] = lambda step=step: step(next(next_layer))
    return runs, len(ring) if device.type == "cuda" else 1


def capture(step: Callable[[Layer], Any], ring: list[Layer]) -> Callable[[], None]:
    """Capture one pass over the ring in a CUDA graph. Returns the function that replays it."""
    stream = torch.cuda.Stream()  # torch requires a warm-up on another stream before a capture
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in ring[:2]:
            step(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in ring:
            step(layer)
    return graph.replay


def summary(results: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each implementation and launch: its time relative to others, the median of its cases and
    the range."""
    by_row: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        by_row.setdefault((result["row"], result["launch"]), []).append(result)
    for (row, launch), cases in by_row.items():
        texts = []
        for other in OTHERS:
            ratios = [case[f"over_{other}"] for case in cases]
            if other != row:
                texts.append(f"{statistics.median(ratios):.2f}x that of {NAMES[other]} "
                             f"({min(ratios):.2f} to {max(ratios):.2f})")
        yield f"{NAMES[row]}, launch {launch}, {len(cases)} cases: its time is " + "; ".join(texts)
