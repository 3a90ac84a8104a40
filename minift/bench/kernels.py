"""python -m minift.bench kernels: the low-rank update of one layer, forward and backward.

Rows are the frozen linear (the floor), eager PyTorch as loralib writes it, this project's Function,
torch.compile of the eager form, PEFT's layer where peft is installed, and the Triton kernels on a GPU. Each
is launched eagerly and, on a GPU, replayed from a CUDA graph. Random inputs come from a ring of layers larger
than the cache, rows take turns sample by sample, and warm-up is apart. Shares are those of the ceilings
measured in the same run: arithmetic, and the bytes that any implementation must move (the tensors of the two
frozen products, and x once more for dA). The last line is one JSON object.

On a CPU the whole takes hours: the third line says how many at least. --shapes, --tokens and --ranks choose.
"""

import importlib.util
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.device import DEVICES, DTYPES, choose_device, choose_dtype, machine_name, seconds
from minift.errors import UserError
from minift.ops.kernel_choice import why_no_triton
from minift.ops.lora import lora_linear
from minift.options import Parser, add_options, option, resolve

SCALE = 2.0
RING = 256  # layers at most: those of a tiny shape stay in the cache, and are not worth minutes
NAMES = {"frozen": "frozen linear", "eager": "eager, as loralib", "function": "Function + addmm",
         "compile": "torch.compile", "peft": "PEFT's layer", "triton": "Triton"}


@dataclass(frozen=True)
class KernelOptions:
    quick: bool = option(False, "two shapes of GPT-2, 2,048 tokens, rank 8, without torch.compile: under two "
                                "minutes on a CPU")
    shapes: str = option("768x768,768x2304/qkv,768x2304/qv,768x3072,3072x768,1024x1024,1280x1280,1600x1600,"
                         "1600x6400,4096x4096,4096x11008", "inputs x outputs of the layers; /qv: a fused "
                         "matrix of three, of which q and v are adapted")
    tokens: str = option("512,2048,8192,16384", "tokens of a batch")
    ranks: str = option("8,16,64", "ranks of the update")
    dropouts: str = option("0,0.1", "dropout on the update's input")
    samples: int = option(21, "timed samples of each row, after three that are not")
    dtype: str = option("auto", "what to compute in; auto: bf16 where the hardware has it", DTYPES)
    device: str = option("auto", "where to compute", DEVICES)


@dataclass(frozen=True)
class Case:
    K: int
    N: int
    M: int
    rank: int
    dropout: float
    parts: str = ""

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple("qkv".index(part) * self.n for part in self.parts) or (0,)

    @property
    def n(self) -> int:
        return self.N // 3 if self.parts else self.N

    def work(self, row: str, item: int) -> tuple[int, int]:
        """The FLOPs and the least bytes of a forward and backward pass, by a row's task."""
        M, N, K, r = self.M, self.N, self.K, self.rank * len(self.offsets)
        flops, nbytes = 4 * M * N * K, 2 * item * (M * K + M * N + N * K)
        if row == "frozen":
            return flops, nbytes
        return flops + 6 * M * r * (K + self.n), nbytes + item * M * K


def cache_bytes(device: torch.device) -> int:
    """The last-level cache; 32 MiB where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) * 1024 if path.exists() else 2**25


def make_ring(case: Case, dtype: torch.dtype, device: torch.device, nbytes: int) -> list[dict[str, Tensor]]:
    """Layers with their inputs, together at least `nbytes`, but no more than RING: equal random values, each
    at its own place."""
    sizes = {"x": (case.M, case.K), "dy": (case.M, case.N), "weight": (case.N, case.K), "bias": (case.N,)}
    first = {name: torch.randn(size, device=device).to(dtype) for name, size in sizes.items()}
    first["weight"] /= math.sqrt(case.K)
    P = len(case.offsets)
    A, B = (torch.randn(size, device=device) for size in ((P * case.rank, case.K), (P * case.n, case.rank)))
    first |= {"A": A / math.sqrt(case.K), "B": B / 10}  # in fp32, as they train here
    first |= {"a": first["A"].to(dtype), "b": first["B"].to(dtype)}  # as loralib and PEFT would have them
    count = min(max(2, math.ceil(nbytes / sum(t.nbytes for t in first.values()))), RING)
    return [{name: t.clone().requires_grad_(name in "xABab") for name, t in first.items()}
            for _ in range(count)]


def eager(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, dropout: float,
          offsets: tuple[int, ...]) -> Tensor:
    """loralib's forward (layers.py: Linear, and for parts MergedLinear, whose zero_pad this is)."""
    y, h = F.linear(x, weight, bias), F.dropout(x, dropout) @ a.T
    if len(b) == len(weight) and len(offsets) == 1:
        return y + (h @ b.T) * SCALE
    update = torch.zeros_like(y)
    for start, h_part, part in zip(offsets, h.chunk(len(offsets), 1), b.chunk(len(offsets)), strict=True):
        update[:, start : start + len(part)] = h_part @ part.T
    return y + update * SCALE


def peft_layers(ring: list[dict[str, Tensor]], case: Case) -> dict[int, torch.nn.Module]:
    """PEFT's layer around each frozen weight, by the identity of its layer; A and B in the compute dtype."""
    import peft
    made = {}
    for layer in ring:
        linear = torch.nn.Linear(case.K, case.N, device="meta")
        linear.weight, linear.bias = (torch.nn.Parameter(layer[name], False) for name in ("weight", "bias"))
        options = peft.LoraConfig(r=case.rank, lora_alpha=SCALE * case.rank, lora_dropout=case.dropout,
                                  target_modules=["0"])
        model = peft.get_peft_model(torch.nn.Sequential(linear), options, autocast_adapter_dtype=False)
        module = model.base_model.model[0]
        for one, name in ((module.lora_A, "a"), (module.lora_B, "b")):
            one["default"].weight.data = layer[name].data
        made[id(layer)] = module.train()
    return made


def implementations(case: Case, ring: list[dict[str, Tensor]], names: list[str]
                    ) -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    """{row: one forward and backward pass of a layer of the ring}."""
    compiled = torch.compile(eager, dynamic=False) if "compile" in names else None
    peft_made = peft_layers(ring, case) if "peft" in names else {}

    def forward(row: str, layer: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        x, weight, bias = layer["x"], layer["weight"], layer["bias"]
        if row == "frozen":
            return F.linear(x, weight, bias), [x]
        if row in ("eager", "compile"):
            call, a, b = eager if row == "eager" else compiled, layer["a"], layer["b"]
            return call(x, weight, bias, a, b, case.dropout, case.offsets), [x, a, b]
        if row == "peft":
            module = peft_made[id(layer)]
            return module(x), [x, module.lora_A["default"].weight, module.lora_B["default"].weight]
        kernel = "triton" if row == "triton" else "torch"
        A, B = layer["A"], layer["B"]
        return lora_linear(x, weight, bias, A, B, SCALE, case.offsets, case.dropout, kernel), [x, A, B]

    def step(row: str) -> Callable[[dict[str, Tensor]], Any]:
        def run(layer: dict[str, Tensor]) -> None:
            y, leaves = forward(row, layer)
            torch.autograd.grad(y, leaves, layer["dy"])
        return run

    return {row: step(row) for row in names}


def capture(step: Callable[[dict[str, Tensor]], Any], ring: list[dict[str, Tensor]]) -> Callable[[], None]:
    """A CUDA graph of one pass over the ring."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for layer in ring[:2]:
            step(layer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in ring:
            step(layer)
    return graph.replay


def measure(case: Case, names: list[str], options: KernelOptions, device: torch.device, dtype: torch.dtype,
            ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A case's rows. On a GPU a sample is a whole pass over the ring, on a CPU one layer of it."""
    ring = make_ring(case, dtype, device, 2 * cache_bytes(device))
    steps, turn = implementations(case, ring, names), itertools.cycle(ring)

    def whole_ring(step: Callable[[dict[str, Tensor]], Any]) -> Callable[[], None]:
        return lambda: [step(layer) for layer in ring]

    if device.type == "cuda":
        per_sample = len(ring)
        runs = {(row, "eager"): whole_ring(step) for row, step in steps.items()}
        runs |= {(row, "graph"): capture(step, ring) for row, step in steps.items()}
    else:
        per_sample = 1
        runs = {(row, "eager"): lambda step=step: step(next(turn)) for row, step in steps.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for sample in range(options.samples + 3):
        for key, work in runs.items():
            taken = seconds(work, device) / per_sample
            if sample >= 3:
                times[key].append(taken)
    for (row, launch), taken in times.items():
        def ratio(other: str, taken: list[float] = taken, launch: str = launch) -> float:
            """Of samples taken one after the other, so that a busy moment of the machine counts for both."""
            return statistics.median(a / b for a, b in zip(taken, times[other, launch], strict=True))

        median, (flops, nbytes) = statistics.median(taken), case.work(row, dtype.itemsize)
        yield {"row": row, "launch": launch, **asdict(case), "ms": median * 1e3, "ms_min": min(taken) * 1e3,
               "ms_max": max(taken) * 1e3, "over_frozen": ratio("frozen"), "over_eager": ratio("eager"),
               "over_function": ratio("function"),
               "flop_share": flops / median / ceilings["flops_per_second"],
               "byte_share": nbytes / median / ceilings["bytes_per_second"]}


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of the best of three large products, and bytes/s of a copy that does not fit into the cache."""
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = [seconds(lambda a=a, b=b: a @ b, device) for _ in range(8)][2:]
        best = max(best, 2 * size**3 / statistics.median(times))
    source = torch.randn(cache_bytes(device) // 2, device=device)  # 4 bytes each: twice the cache
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(8)][2:]
    return {"flops_per_second": best, "bytes_per_second": 2 * source.nbytes / statistics.median(times)}


def rows_here(options: KernelOptions, device: torch.device) -> tuple[list[str], list[str]]:
    """The rows that can be measured, and why the others cannot."""
    missing = {}
    if options.quick and device.type == "cpu":
        missing["compile"] = "left out by --quick"
    if importlib.util.find_spec("peft") is None:
        missing["peft"] = "peft is not installed"
    if device.type != "cuda" or why_no_triton(device):
        missing["triton"] = why_no_triton(device) or "the interpreter's time means nothing"
    return ([row for row in NAMES if row not in missing],
            [f"{NAMES[row]} is not measured: {why}" for row, why in missing.items()])


def verdicts(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Wins and losses, one line for each pair of implementations."""
    def speeds(row: str, launch: str) -> dict[tuple, float]:
        return {tuple(r[field.name] for field in fields(Case)): 1 / r["ms"] for r in rows
                if (r["row"], r["launch"]) == (row, launch)}

    pairs = (("function", "eager"), ("function", "compile"), ("function", "peft"), ("triton", "function"))
    for (row, other), launch in itertools.product(pairs, ("eager", "graph")):
        ours, theirs = speeds(row, launch), speeds(other, launch)
        gains = sorted(ours[case] / theirs[case] for case in ours.keys() & theirs.keys())
        if gains:
            yield (f"{NAMES[row]} against {NAMES[other]}, launch {launch}: {statistics.median(gains):.2f}x "
                   f"as fast in the median, {gains[0]:.2f}x at worst, {gains[-1]:.2f}x at best; slower in "
                   f"{sum(gain < 1 for gain in gains)} of {len(gains)}")


def table_lines(rows: list[dict[str, Any]], device: torch.device, dtype: str) -> Iterator[str]:
    """Lines for TRITON_WINS in minift/ops/kernel_choice.py: the tokens from which on Triton won at every
    count. What counts is how many parts there are, not which."""
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        name, r = torch.cuda.get_device_name(device), row
        parts, n = (len(r["parts"]), r["N"] // 3) if r["parts"] else (1, r["N"])
        return (name, dtype, r["K"], r["N"], parts, n, r["rank"], r["dropout"] > 0)

    measured = sorted((r for r in rows if (r["row"], r["launch"]) == ("triton", "eager")),
                      key=lambda r: (key(r), -r["M"]))
    for shape, group in itertools.groupby(measured, key):
        won = list(itertools.takewhile(lambda r: r["over_function"] < 1, group))
        if won:
            yield f"    {shape}: {won[-1]['M']},"


def numbers(text: str, kind: type, least: float) -> list[Any]:
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UserError(f"{text!r} is no comma list of numbers from {least} on")
    return values


def bench_kernels(arguments: list[str]) -> None:
    parser = Parser(prog="python -m minift.bench kernels", description=__doc__)
    add_options(parser, "options", KernelOptions)
    small = {name: (value, "quick") for name, value in
             {"shapes": "768x768,768x3072", "tokens": "2048", "ranks": "8", "samples": 9}.items()}
    args = parser.parse_args(arguments)
    options, _ = resolve(KernelOptions, args, small if args.quick else {})
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    shapes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:/(q?k?v?))?", text)
              for text in options.shapes.split(",")]
    if not all(shapes) or any(s[3] and int(s[2]) % 3 for s in shapes) or options.samples < 1:
        raise UserError(f"--shapes {options.shapes} --samples {options.samples}: shapes are INPUTSxOUTPUTS, "
                        "or INPUTSxOUTPUTS/qv for parts of three equal ones, and samples at least 1")
    tokens, ranks = numbers(options.tokens, int, 1), numbers(options.ranks, int, 1)
    cases = [Case(int(s[1]), int(s[2]), M, rank, dropout, s[3] or "") for s, M, rank, dropout in
             itertools.product(shapes, tokens, ranks, numbers(options.dropouts, float, 0))]
    if max(case.dropout for case in cases) >= 1:
        raise UserError(f"--dropouts {options.dropouts}: all below 1")
    torch.manual_seed(0)
    names, missing = rows_here(options, device)
    ceilings = measure_ceilings(dtype, device)
    facts = {"machine": machine_name(device), "torch": torch.__version__, **asdict(options), **ceilings,
             "dtype": str(dtype).removeprefix("torch."), "ring_bytes": 2 * cache_bytes(device),
             "not_measured": missing}
    print(f"{facts['machine']}, torch {torch.__version__}, {facts['dtype']}; measured ceilings "
          f"{ceilings['flops_per_second'] / 1e12:.3g} TFLOP/s and "
          f"{ceilings['bytes_per_second'] / 1e9:.3g} GB/s; inputs rotate through "
          f"{facts['ring_bytes'] / 2**20:.0f} MiB")
    print("\n".join(missing))
    if device.type == "cpu":
        flops = sum(case.work("function", dtype.itemsize)[0] for case in cases)
        least = flops * len(names) * (options.samples + 3) / ceilings["flops_per_second"]
        print(f"{len(cases)} cases, at least {least / 60:.1f} minutes")
    rows = []
    for case in cases:
        print(f"\n{case.K} x {case.N}{'/' if case.parts else ''}{case.parts}, {case.M:,} tokens, rank "
              f"{case.rank}, dropout {case.dropout:g}\n")
        print("| implementation    | launch |       ms, min to max | / frozen | / Function | FLOPs | bytes |")
        print("|-------------------|--------|---------------------:|---------:|-----------:|------:|------:|")
        here = [name for name in names if name != "peft" or not case.parts]  # PEFT adapts no part of a matrix
        for row in measure(case, here, options, device, dtype, ceilings):
            rows.append(row)
            spread = f"{row['ms']:.3f}, {row['ms_min']:.3f} to {row['ms_max']:.3f}"
            print(f"| {NAMES[row['row']]:17} | {row['launch']:6} | {spread:>21} | "
                  f"{row['over_frozen']:8.2f} | {row['over_function']:10.2f} | {row['flop_share']:5.0%} | "
                  f"{row['byte_share']:5.0%} |", flush=True)
        if "compile" in names:
            torch._dynamo.reset()
    print("\n" + "\n".join(verdicts(rows)))
    if "triton" in names:
        print("\nfor TRITON_WINS in minift/ops/kernel_choice.py:")
        print("\n".join(table_lines(rows, device, facts["dtype"])))
    print(json.dumps(facts | {"rows": rows}))
