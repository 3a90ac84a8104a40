"""python -m minift.bench decode: the speed of generation with a key-value cache, with random weights.

Greedy, and no token ends a row, so every run writes the same number of tokens. The time to the first token, which is
mostly the pass over the prompts, is measured by itself. The last line is one JSON object.
"""

import random
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from minift import modes
from minift.bench.busy import BUSY_COLUMNS, BUSY_WIDTHS, compare_busy
from minift.bench.command import print_facts, print_results, read_options
from minift.bench.models import SIZES, random_model
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
from minift.model.generate import generate
from minift.modes import MODES
from minift.options import option
from minift.report.latency import time_request
from minift.report.table import format_bytes

COLUMNS = {
    "mode": ("mode", str),
    "first_token_ms": ("first token ms", "{:.0f}".format),
    "total_ms": ("all ms", "{:.0f}".format),
    "total_ms_min": ("min", "{:.0f}".format),
    "total_ms_max": ("max", "{:.0f}".format),
    "new_tokens_per_second": ("new tokens/s", "{:,.1f}".format),
    "decode_tokens_per_second": ("after the first", "{:,.1f}".format),  # without the pass over the prompts
    "peak_memory_bytes": ("peak memory", format_bytes),
}
WIDTHS = [9, 14, 7, 7, 7, 12, 15, 11]


@dataclass(frozen=True)
class DecodeOptions:
    size: str = option("gpt2", "size of the model", choices=tuple(SIZES))
    mode: str = option("full", f"{', '.join(MODES)}, a comma list of them, or all; full decodes as the base "
                               "does")
    batch: int = option(16, "prompts that are continued together", least=1)
    prompt_tokens: int = option(140, "mean tokens of a prompt; the lengths vary by half of it", least=1)
    new_tokens: int = option(64, "tokens written for each prompt", least=2)
    repeats: int = option(5, "timed runs, after one that is not", least=1)
    dtype: str = option("auto", "compute dtype; auto: bf16 where the hardware has it", choices=DTYPES)
    device: str = option("auto", "where to compute", choices=DEVICES)
    busy: bool = option(False, "also measure beside a program that keeps one core busy")


def bench_decode(arguments: list[str]) -> None:
    options = read_options("decode", __doc__, DecodeOptions, arguments)
    names = modes.parse_modes(options.mode)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    facts = print_facts(options, device, dtype=dtype_name(dtype))
    columns = COLUMNS | BUSY_COLUMNS if options.busy else COLUMNS
    widths = WIDTHS + BUSY_WIDTHS if options.busy else WIDTHS
    print_results((measure(name, options, dtype, device) for name in names), facts, columns, widths)


def random_prompts(options: DecodeOptions, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens. Their lengths are uniform between half and one and a half times the mean."""
    rng = random.Random(0)
    prompts = []
    for _ in range(options.batch):
        length = max(1, round(options.prompt_tokens * rng.uniform(0.5, 1.5)))
        prompts.append([rng.randrange(vocab_size) for _ in range(length)])
    return prompts


def measure(name: str, options: DecodeOptions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One mode's figures, under the names of COLUMNS; times are medians. Raises UserError for too long rows."""
    reset_peak_memory(device)
    model = random_model(options.size, dtype, device)
    modes.apply(model, name, MODES[name].Options())
    model.requires_grad_(False)  # so that every weight is stored in the compute dtype, as in eval.py
    model.set_compute_dtype(dtype)
    model.to(device).eval()
    prompts = random_prompts(options, model.config.vocab_size)
    longest = model.prompt_tokens + max(map(len, prompts)) + options.new_tokens
    if longest > model.config.n_positions:
        raise UserError(f"--prompt-tokens {options.prompt_tokens} --new-tokens {options.new_tokens}: the "
                        f"longest row takes {longest} of the model's {model.config.n_positions} positions: "
                        "lower them")

    generate(model, prompts, options.new_tokens)  # warm-up
    requests = [time_request(model, prompts, options.new_tokens) for _ in range(options.repeats)]
    first_times, times = zip(*requests, strict=True)
    first, total = statistics.median(first_times), statistics.median(times)

    def rate() -> float:
        _, seconds = time_request(model, prompts, options.new_tokens)
        return options.batch * options.new_tokens / seconds

    busy = compare_busy(rate) if options.busy else {}
    return {
        "mode": name,
        "first_token_ms": first * 1e3,
        "total_ms": total * 1e3,
        "total_ms_min": min(times) * 1e3,
        "total_ms_max": max(times) * 1e3,
        "new_tokens_per_second": options.batch * options.new_tokens / total,
        "decode_tokens_per_second": options.batch * (options.new_tokens - 1) / (total - first),
        "peak_memory_bytes": peak_memory(device),
    } | busy
