"""python -m minift.bench kernels: the low-rank update of one layer, forward and backward.

Implementations: the frozen linear layer (no update, so no other can be faster), eager PyTorch as in loralib, this
project's Function and its Triton kernels, torch.compile of the eager form with max-autotune, and PEFT's layer if peft
is installed. --rows chooses some of them. Each is launched eagerly and, on a GPU, also replayed from a CUDA graph. With
--parts, the two large products and each Triton kernel alone, beside the least time of their FLOPs and bytes.

The layers and their inputs form a ring that is larger than the cache, so each pass reads from memory: first the forward
passes of all its layers, then the backward passes in reverse order, as in training. Implementations take turns, sample
by sample. FLOPs and bytes are given relative to the rates of the machine, measured in the same run.

Lines are printed as they are measured, and --out FILE.jsonl grows with them; the last line is one JSON object. On a CPU
all cases take hours; the third line gives an estimate. --shapes, --tokens and --ranks choose cases.
"""

import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from minift.bench import ceilings, parts
from minift.bench.command import LineFile
from minift.bench.layers import (
    NAMES,
    OUR_KERNELS,
    Case,
    Layer,
    find_rows,
    forward_of,
    make_ring,
    ring_size,
    training_pass,
)
from minift.bench.timing import SAMPLE_SECONDS, WARMUP, time_in_turn
from minift.device import DEVICES, DTYPES, choose_device, choose_dtype, dtype_name, machine_name
from minift.errors import UserError
from minift.ops.kernel_choice import RULE_FILE, gpu_generation, write_rule
from minift.options import Parser, add_options, option, resolve
from minift.report.table import table_head, table_row

OTHERS = ("frozen", "eager", "torch")  # the time of each implementation is given relative to these
QUICK = {"shapes": "768x768,768x3072", "tokens": "2048", "ranks": "8", "samples": 5,
         "rows": ",".join(row for row in NAMES if row != "compile")}
CPU_LAYERS = 3  # layers in a sample on a CPU
COMPILE_SECONDS = {"compile": 60, "triton": 5, "hybrid": 5, "persistent": 5}  # for a new shape, a guess
COLUMNS = {
    "row": ("implementation", lambda row: NAMES[row]),
    "launch": ("launch", str),
    "ms": ("ms", "{:.3f}".format),
    "ms_min": ("min", "{:.3f}".format),
    "ms_max": ("max", "{:.3f}".format),
    "over_frozen": ("/ frozen", "{:.2f}".format),
    "over_eager": ("/ eager", "{:.2f}".format),
    "over_torch": ("/ Function", "{:.2f}".format),
    "flop_share": ("FLOPs", "{:.0%}".format),
    "byte_share": ("bytes", "{:.0%}".format),
}
WIDTHS = [17, 6, 8, 8, 8, 8, 7, 10, 5, 5]
Run = tuple[str, str]  # an implementation, and the way to launch it


@dataclass(frozen=True)
class KernelOptions:
    quick: bool = option(False, "two shapes of GPT-2, 2,048 tokens, rank 8, without torch.compile: under a minute on "
                                "2 cores")
    shapes: str = option("768x768,768x2304/qkv,768x2304/qv,768x3072,3072x768,1024x1024,1280x1280,1600x1600,"
                         "1600x6400,4096x4096,4096x11008", "inputs x outputs of the layers; /qv: a fused "
                         "matrix of three, of which q and v get an update")
    tokens: str = option("512,2048,8192,16384", "tokens in a batch")
    ranks: str = option("8,16,64", "ranks of the update")
    dropouts: str = option("0,0.1", "dropout on the update's input")
    rows: str = option(",".join(NAMES), "implementations")
    parts: bool = option(False, "also each product and each kernel alone")
    samples: int = option(9, f"timed samples of each row, after {WARMUP} that are not", least=1)
    dtype: str = option("auto", "compute dtype; auto: bf16 where the hardware has it", choices=DTYPES)
    device: str = option("auto", "where to compute", choices=DEVICES)
    write_rule: bool = option(False, "write the rule of --kernel auto for this GPU into minift/ops/kernel_rule.json")
    out: str | None = option(None, "a file of JSON lines that grows with each result; it is replaced")


def bench_kernels(arguments: list[str]) -> None:
    parser = Parser(prog="python -m minift.bench kernels", description=__doc__)
    add_options(parser, "options", KernelOptions)
    args = parser.parse_args(arguments)
    quick = {name: (value, "--quick") for name, value in QUICK.items()} if args.quick else {}
    options, _ = resolve(KernelOptions, args, quick)
    cases, chosen = parse_cases(options), parse_rows(options.rows)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.write_rule and device.type != "cuda":
        raise UserError("--write-rule: the rule is about GPUs, and there is none here: leave it out")
    torch.manual_seed(0)

    rows, missing = find_rows(chosen, device)
    if not rows:
        raise UserError(f"--rows {options.rows}: none can be measured here: {'; '.join(missing.values())}")
    with LineFile(options.out) as lines:
        facts = measure_machine(dtype, device) | {"not_measured": missing, "options": asdict(options)}
        lines.write(facts)
        print(describe(facts))
        print("; ".join(f"{NAMES[row]} is not measured: {reason}" for row, reason in missing.items()))
        print(f"{len(cases)} cases, about {estimate(cases, rows, options, facts, device) / 60:.1f} minutes")
        results, started = [], time.perf_counter()
        for number, case in enumerate(cases, start=1):
            print(f"\n{case}\n\n{table_head(COLUMNS, WIDTHS)}")
            for result in measure(case, rows, options.samples, facts, dtype, device):
                results.append(result)
                lines.write(result)
                print(table_row(result, COLUMNS, WIDTHS), flush=True)
            if options.parts:
                print(f"\n{table_head(parts.COLUMNS, parts.WIDTHS)}")
                for result in measure_parts(case, options.samples, facts, dtype, device):
                    results.append(result)
                    lines.write(result)
                    print(table_row(result, parts.COLUMNS, parts.WIDTHS), flush=True)
            left = (time.perf_counter() - started) / number * (len(cases) - number)
            print(f"{number} of {len(cases)} cases; about {left / 60:.1f} minutes left")
    if options.write_rule:
        write_rule(RULE_FILE, rule_measurements(results, gpu_generation(device)))
        print(f"the rule of --kernel auto is written: {RULE_FILE}")
    print("\n" + "\n".join(summary(results)))
    print(json.dumps(facts | {"rows": results}))


def describe(facts: dict[str, Any]) -> str:
    return (f"{facts['machine']}, torch {facts['torch']}, {facts['dtype']}; measured ceilings "
            f"{facts['flops_per_second'] / 1e12:.3g} TFLOP/s and {facts['bytes_per_second'] / 1e9:.3g} GB/s; "
            f"inputs rotate through {facts['ring_bytes'] / 2**20:.0f} MiB")


def measure_machine(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The machine and its ceilings."""
    return {"machine": machine_name(device), "torch": torch.__version__, "dtype": dtype_name(dtype),
            "flops_per_second": ceilings.matmul_rate(dtype, device),
            "bytes_per_second": ceilings.copy_rate(device),
            "ring_bytes": 2 * ceilings.cache_bytes(device)}


def estimate(cases: list[Case], rows: list[str], options: KernelOptions, facts: dict[str, Any],
             device: torch.device) -> float:
    """A guess of the seconds that all cases take: each implementation at a third of the machine's rate of products, and
    the compilation."""
    seconds, is_cuda = 0.0, device.type == "cuda"
    samples = options.samples + WARMUP + (2 if is_cuda else 0)  # 2: to find the calls in a sample
    shapes = len({(case.K, case.N, case.parts, case.rank, case.dropout) for case in cases})
    for case in cases:
        layer_seconds = 3 * case.work("torch", 2)[0] / facts["flops_per_second"]
        layers = ring_size(case, 2, facts["ring_bytes"]) if is_cuda else CPU_LAYERS
        pass_seconds = max(layers * layer_seconds, SAMPLE_SECONDS if is_cuda else 0)
        seconds += len(rows) * (2 if is_cuda else 1) * samples * pass_seconds
    if is_cuda:
        seconds += shapes * sum(COMPILE_SECONDS.get(row, 0) for row in rows)
    return seconds


def parse_rows(text: str) -> list[str]:
    """A comma list of implementations. Raises UserError."""
    rows = text.split(",")
    for row in rows:
        if row not in NAMES or rows.count(row) > 1:
            raise UserError(f"--rows {text}: unknown or repeated {row!r}; there are {', '.join(NAMES)}")
    return rows


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


def measure(case: Case, rows: list[str], samples: int, facts: dict[str, Any], dtype: torch.dtype,
            device: torch.device) -> Iterator[dict[str, Any]]:
    """The results of a case, one for each implementation and way to launch it."""
    ring = make_ring(case, dtype, device, facts["ring_bytes"])
    rows = [row for row in rows if row != "peft" or not case.parts]  # PEFT has no update of parts
    runs, layers = make_runs(case, rows, ring, device)
    times = time_in_turn(runs, samples, device)
    if "compile" in rows:
        torch._dynamo.reset()  # torch.compile stops compiling after a few shapes
    for (row, launch), of_pass in times.items():
        flops, nbytes = case.work(row, dtype.itemsize)
        taken = [seconds / layers for seconds in of_pass]
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
            if (other, launch) in times:
                # ratios of samples that were measured one after the other: a busy moment of the machine slows both
                ratios = [a / b for a, b in zip(of_pass, times[other, launch], strict=True)]
                result[f"over_{other}"] = statistics.median(ratios)
        yield result


def make_runs(case: Case, rows: list[str], ring: list[Layer], device: torch.device
              ) -> tuple[dict[Run, Callable[[], None]], int]:
    """{(implementation, launch): function that runs one pass}, and the number of layers in a pass: on a GPU the full
    ring; on a CPU the next CPU_LAYERS of it, which take long enough."""
    layers = len(ring) if device.type == "cuda" else CPU_LAYERS
    next_layer = itertools.cycle(ring)  # shared by all implementations, or one would find its layers in the cache
    runs: dict[Run, Callable[[], None]] = {}
    for row in rows:
        forward = forward_of(row, case, ring)

        def run(forward: Any = forward) -> None:
            training_pass(forward, list(itertools.islice(next_layer, layers)))

        runs[row, "eager"] = run
        if device.type == "cuda":
            runs[row, "graph"] = capture(run)
    return runs, layers


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Capture a pass in a CUDA graph. Returns the function that replays it."""
    stream = torch.cuda.Stream()  # torch requires a warm-up on another stream before a capture
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_parts(case: Case, samples: int, facts: dict[str, Any], dtype: torch.dtype, device: torch.device
                  ) -> Iterator[dict[str, Any]]:
    """The results of a case, one for each product and each kernel alone."""
    ring = make_ring(case, dtype, device, facts["ring_bytes"])
    usable, _ = find_rows(OUR_KERNELS, device)
    return parts.measure(case, ring, usable, samples, facts)


def rule_measurements(results: list[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """The results in the form that kernel_choice.write_rule takes. gpu: as gpu_generation says."""
    times: dict[tuple[Case, str], dict[str, float]] = {}
    for result in results:
        if result.get("row") in OUR_KERNELS:
            case = Case(*(result[field.name] for field in fields(Case)))
            times.setdefault((case, result["row"]), {})[f"ms_{result['launch']}"] = result["ms"]
    found = []
    for (case, row), ms in times.items():
        if len(ms) == 2:  # both ways to launch it
            found.append({"gpu": gpu, "K": case.K, "N": case.N, "parts": case.parts, "n": case.part_size,
                          "rank": case.rank, "dropout": case.dropout, "tokens": case.M, "implementation": row} | ms)
    return found


def summary(results: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each implementation and launch: its time relative to others, the median of its cases and
    the range."""
    by_run: dict[Run, list[dict[str, Any]]] = {}
    for result in results:
        if "row" in result:
            by_run.setdefault((result["row"], result["launch"]), []).append(result)
    for (row, launch), cases in by_run.items():
        texts = []
        for other in OTHERS:
            ratios = [case[f"over_{other}"] for case in cases if f"over_{other}" in case]
            if ratios and other != row:
                texts.append(f"{statistics.median(ratios):.2f}x that of {NAMES[other]} "
                             f"({min(ratios):.2f} to {max(ratios):.2f})")
        if texts:
            yield f"{NAMES[row]}, launch {launch}, {len(cases)} cases: its time is " + "; ".join(texts)
