"""python -m minift.bench train: the cost of a training step of each mode, with random weights.

Warm-up is not counted, and medians come with their range. The rate of arithmetic is compared with that of the model's
largest matrix product, measured in the same run. The last line is one JSON object.
"""

import random
import statistics
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from minift import modes
from minift.bench.busy import BUSY_COLUMNS, BUSY_WIDTHS, compare_busy
from minift.bench.ceilings import linear_rate
from minift.bench.command import print_facts, print_results, read_options
from minift.bench.models import SIZES, random_model
from minift.bench.timing import time_each
from minift.device import (
    DEVICES,
    DTYPES,
    choose_device,
    choose_dtype,
    dtype_name,
    peak_memory,
    reset_peak_memory,
)
from minift.errors import UserError
from minift.graphs import check_graphs, make_graphs
from minift.model.packing import Row
from minift.modes import MODES
from minift.ops.kernel_choice import KERNELS, check_kernel
from minift.options import flag, option
from minift.plan import MemoryMeter
from minift.report.table import format_bytes
from minift.run.config import TrainOptions
from minift.training import apply_step, make_optimizer, train_step

WARMUP = 2  # steps that are not timed
SPREAD = 0.5  # for --ragged: the standard deviation of the logarithm of a row's length
COLUMNS = {
    "mode": ("mode", str),
    "step_ms": ("step ms", "{:.1f}".format),
    "step_ms_min": ("min", "{:.1f}".format),
    "step_ms_max": ("max", "{:.1f}".format),
    "rows_per_second": ("rows/s", "{:.2f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "peak_memory_bytes": ("peak memory", format_bytes),
    "flops_per_second": ("GFLOP/s", lambda flops: f"{flops / 1e9:.0f}"),
    "share": ("of matmuls", "{:.0%}".format),  # of the rate of the largest matrix product
}
WIDTHS = [9, 7, 7, 7, 7, 9, 11, 8, 10]


@dataclass(frozen=True)
class TrainBenchOptions:
    size: str = option("gpt2", "size of the model", choices=tuple(SIZES))
    mode: str = option("all", f"{', '.join(MODES)}, a comma list of them, or all")
    batch: int = option(8, "rows in a step", least=1)
    tokens: int = option(167, "tokens in a row (the default: the mean of SAMSum)", least=2)
    ragged: bool = option(False, "rows of different lengths, drawn with a fixed seed around --tokens, new "
                                 "ones in each step")
    targets: int = option(27, "target tokens in a row", least=1)
    steps: int = option(10, f"timed steps of each mode, after {WARMUP} that are not", least=1)
    checkpoint: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    rank: int | None = option(None, "LoRA's rank (default: the mode's)", least=1)
    dropout: float | None = option(None, "LoRA's dropout (default: the mode's)", least=0, below=1)
    kernel: str | None = option(None, "LoRA's implementation (default: auto)", choices=KERNELS)
    graphs: str = option("auto", "CUDA graphs of the steps, as in train.py", choices=("auto", "on", "off"))
    dtype: str = option("auto", "compute dtype; auto: bf16 where the hardware has it", choices=DTYPES)
    device: str = option("auto", "where to compute", choices=DEVICES)
    busy: bool = option(False, "also measure beside a program that keeps one core busy")


def bench_train(arguments: list[str]) -> None:
    options = read_options("train", __doc__, TrainBenchOptions, arguments)
    names = modes.parse_modes(options.mode)
    check(options, names)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    check_kernel(options.kernel or "auto", device)
    check_graphs(train_settings(options), SIZES[options.size])
    facts = print_facts(options, device, dtype=dtype_name(dtype))
    columns = COLUMNS | BUSY_COLUMNS if options.busy else COLUMNS
    widths = WIDTHS + BUSY_WIDTHS if options.busy else WIDTHS
    results = (measure(name, mode_options(name, options), options, dtype, device) for name in names)
    print_results(results, facts, columns, widths)


def check(options: TrainBenchOptions, names: list[str]) -> None:
    """Raises UserError for options that contradict each other."""
    if options.targets >= options.tokens:
        raise UserError(f"--targets {options.targets}: must be fewer than --tokens {options.tokens}")
    n_positions = SIZES[options.size].n_positions
    if options.tokens > n_positions:
        raise UserError(f"--tokens {options.tokens}: {options.size} has {n_positions} positions")
    for name in ("rank", "dropout", "kernel"):
        if getattr(options, name) is not None and "lora" not in names:
            raise UserError(f"{flag(name)} is an option of mode lora: leave it out, or add lora to --mode")


def random_steps(options: TrainBenchOptions, prompt_tokens: int) -> list[list[Row]]:
    """The rows of each step, warm-up included: random tokens, of which the last --targets of a row are its targets.
    prompt_tokens: the positions that the mode reserves."""
    rng, config = random.Random(0), SIZES[options.size]
    longest = config.n_positions - prompt_tokens
    steps = []
    for _ in range(WARMUP + options.steps):
        rows = []
        for _ in range(options.batch):
            length = options.tokens
            if options.ragged:
                # log-normal, like the lengths of texts; with -SPREAD^2 / 2 the mean of the factor is 1
                factor = rng.lognormvariate(-SPREAD**2 / 2, SPREAD)
                length = round(options.tokens * factor)
                length = min(max(length, options.targets + 1), longest)
            ids = [rng.randrange(config.vocab_size) for _ in range(length)]
            rows.append(Row(ids, ((length - options.targets, length),)))
        steps.append(rows)
    return steps


def measure(name: str, chosen: Any, options: TrainBenchOptions, dtype: torch.dtype, device: torch.device
            ) -> dict[str, Any]:
    """One mode's figures, under the names of COLUMNS. Rates are per second of the median step. chosen: the mode's
    options."""
    reset_peak_memory(device)
    model = random_model(options.size, dtype, device)
    modes.apply(model, name, chosen)
    model.checkpoint = options.checkpoint
    model.set_compute_dtype(dtype)
    if MODES[name].uses_kernel:  # as in training.apply_config
        model.set_kernel(options.kernel or "auto")
    model.to(device).train()
    optimizer = make_optimizer(model, MODES[name].lr, MODES[name].weight_decay)

    tuned = modes.tuned_parameters(model).values()

    graphs = make_graphs(model, optimizer, train_settings(options), tuned)

    def step(rows: list[Row]) -> None:
        if graphs:
            graphs.step([rows])
        else:
            apply_step(optimizer, train_step(model, [rows], TrainOptions.clip, tuned=tuned))

    steps = random_steps(options, model.prompt_tokens)
    works = [partial(step, rows) for rows in steps]
    first_times = time_each(works, device)[WARMUP:]
    if device.type == "cuda":
        # A new shape of rows costs a GPU more: cuDNN plans, and a graph is recorded the second time. So every shape
        # comes twice before the steps that are timed.
        time_each(works, device)
        times = time_each(works, device)[WARMUP:]
    else:
        times = first_times
    rates = [count_tokens(rows) / seconds for rows, seconds in zip(steps[WARMUP:], times, strict=True)]
    peak = peak_memory(device)
    with MemoryMeter(device.type, model.config) as meter:
        # one more step, not timed since the meter is slow, to count FLOPs
        apply_step(optimizer, train_step(model, [steps[-1]], TrainOptions.clip, tuned=tuned))

    def rate() -> float:
        seconds = time_each(works[WARMUP:], device)
        return sum(map(count_tokens, steps[WARMUP:])) / sum(seconds)

    busy = compare_busy(rate) if options.busy else {}
    tokens_per_second = statistics.median(rates)
    flops_per_token = meter.flops / count_tokens(steps[-1])  # ragged steps differ in tokens, not much in this
    flops_per_second = flops_per_token * tokens_per_second
    C = model.config.n_embd
    matmul_rate = linear_rate(options.batch * (options.tokens - 1), C, 4 * C, dtype, device)  # of the MLP
    median = statistics.median(times)
    return {
        "mode": name,
        "step_ms": median * 1e3,
        "step_ms_min": min(times) * 1e3,
        "step_ms_max": max(times) * 1e3,
        "first_ms": statistics.median(first_times) * 1e3,  # a step whose shape is new
        "graphs": "on" if graphs and graphs.graphs else "off",
        "rows_per_second": options.batch / median,
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": peak,
        "flops_per_step": meter.flops,
        "flops_per_second": flops_per_second,
        "matmul_flops_per_second": matmul_rate,
        "share": flops_per_second / matmul_rate,
    } | busy


def train_settings(options: TrainBenchOptions) -> TrainOptions:
    """The options as those of a training run."""
    return TrainOptions(batch=options.batch, checkpoint=options.checkpoint, dtype=options.dtype, device=options.device,
                        graphs=options.graphs)


def mode_options(name: str, options: TrainBenchOptions) -> Any:
    """The mode's default options; LoRA takes --rank and --dropout."""
    chosen = MODES[name].Options()
    if name == "lora" and options.rank is not None:
        chosen = replace(chosen, rank=options.rank)
    if name == "lora" and options.dropout is not None:
        chosen = replace(chosen, dropout=options.dropout)
    return chosen


def count_tokens(rows: list[Row]) -> int:
    """The tokens that the model reads: the last token of a row is a target only."""
    return sum(len(row.ids) - 1 for row in rows)
