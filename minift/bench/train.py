"""python -m minift.bench train: what a step of each mode costs, with random weights.

Warm-up is apart, medians come with their spread, and the machine's own ceiling is measured in the same run.
The last line is one JSON object.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minift import modes
from minift.data.dataset import Example, Pair
from minift.device import (
    DEVICES,
    DTYPES,
    choose_device,
    choose_dtype,
    machine_name,
    peak_memory,
    reset_peak_memory,
    seconds,
)
from minift.errors import UserError
from minift.files.weights import PRESETS
from minift.model.gpt import GPT
from minift.options import Parser, add_options, option, resolve
from minift.plan import Meter
from minift.report import compare
from minift.run.config import TrainOptions


@dataclass(frozen=True)
class BenchOptions:
    size: str = option("gpt2", f"the model's shape: {', '.join(PRESETS)}")
    mode: str = option("all", f"{', '.join(modes.MODES)}, a comma list of them, or all")
    batch: int = option(8, "rows of a step")
    tokens: int = option(167, "tokens of a row (the default: a mean row of SAMSum)")
    targets: int = option(27, "target tokens of a row")
    steps: int = option(10, "timed steps of each mode, after two that are not")
    checkpoint: bool = option(False, "compute activations again in the backward pass instead of keeping them")
    dtype: str = option("auto", "what to compute in; auto: bf16 where the hardware has it", DTYPES)
    device: str = option("auto", "where to compute", DEVICES)


def matmul_rate(tokens: int, n_embd: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the model's largest kind of product, (tokens, C) x (C, 4C): the median of twenty."""
    x = torch.randn(tokens, n_embd, device=device, dtype=dtype)
    weight = torch.randn(4 * n_embd, n_embd, device=device, dtype=dtype)
    times = [seconds(lambda: torch.nn.functional.linear(x, weight), device) for _ in range(25)][5:]
    return 2 * tokens * 4 * n_embd * n_embd / statistics.median(times)


def measure(mode: str, options: BenchOptions, train: Any) -> dict[str, Any]:
    """One mode's figures. `train` is the module train.py, whose step is what is timed."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    reset_peak_memory(device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # in which frozen weights stay: no second copy of a large model
    model = GPT(PRESETS[options.size].config)
    torch.set_default_dtype(torch.float32)
    model.init_weights(0)
    defaults = modes.MODES[mode].TRAINING
    modes.apply(model, mode, modes.MODES[mode].Options())
    model.checkpoint = options.checkpoint
    model.set_compute_dtype(dtype)
    model.to(device).train()
    optimizer = train.make_optimizer(model, defaults["lr"], defaults["weight_decay"])
    ids = torch.randint(model.config.vocab_size, (options.batch, options.tokens)).tolist()
    batch = [Example(row, options.tokens - options.targets, Pair("", "", "random")) for row in ids]

    def step() -> None:
        train.train_step(model, [batch], TrainOptions.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    times = [seconds(step, device) for _ in range(options.steps)]
    peak = peak_memory(device)
    with Meter(device.type, model.config) as meter:
        step()
    median, real = statistics.median(times), options.batch * (options.tokens - 1)  # the last is a target only
    rate = matmul_rate(real, model.config.n_embd, dtype, device)
    return {
        "mode": mode,
        "step_ms": median * 1e3, "step_ms_min": min(times) * 1e3, "step_ms_max": max(times) * 1e3,
        "rows_per_second": options.batch / median, "tokens_per_second": real / median,
        "peak_memory_bytes": peak, "flops_per_step": meter.flops, "flops_per_second": meter.flops / median,
        "matmul_flops_per_second": rate, "share": meter.flops / median / rate}


def bench_train(arguments: list[str]) -> None:
    import train  # the script in the repository's root: its step is what is measured
    parser = Parser(prog="python -m minift.bench train", description=__doc__)
    add_options(parser, "options", BenchOptions)
    options, _ = resolve(BenchOptions, parser.parse_args(arguments), {})
    chosen = list(modes.MODES) if options.mode == "all" else options.mode.split(",")
    if options.size not in PRESETS or not set(chosen) <= set(modes.MODES):
        raise UserError(f"--size {options.size} --mode {options.mode}: sizes are {', '.join(PRESETS)}, modes "
                        f"{', '.join(modes.MODES)}")
    if not 1 <= options.targets < options.tokens or min(options.batch, options.steps) < 1:
        raise UserError(f"--tokens {options.tokens} --targets {options.targets} --batch {options.batch} "
                        f"--steps {options.steps}: all at least 1, and fewer targets than tokens")
    device = choose_device(options.device)
    facts = {"machine": machine_name(device), "torch": torch.__version__, **asdict(options),
             "dtype": str(choose_dtype(options.dtype, device)).removeprefix("torch.")}
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    print("| mode      |  step ms, min to max  | rows/s | tokens/s | peak memory | GFLOP/s | of products' |")
    print("|-----------|----------------------:|-------:|---------:|------------:|--------:|-------------:|")
    rows = []
    for mode in chosen:
        row = measure(mode, options, train)
        rows.append(row)
        spread = f"{row['step_ms']:.0f}, {row['step_ms_min']:.0f} to {row['step_ms_max']:.0f}"
        print(f"| {mode:9} | {spread:>21} | {row['rows_per_second']:6.2f} | "
              f"{row['tokens_per_second']:8,.0f} | "
              f"{compare.cell('peak_memory_bytes', row['peak_memory_bytes']):>11} | "
              f"{row['flops_per_second'] / 1e9:7.0f} | {row['share']:12.0%} |", flush=True)
    print(json.dumps(facts | {"rows": rows}))
