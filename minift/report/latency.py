"""eval.py --latency: the speed of generation with the base, the tuned model and, if its mode can merge, the merged one.

A request is one prompt, or sixteen at once, continued greedily by a fixed number of tokens; no token ends it. In each
round every model answers the same request, one after another in a rotated order, so that a busy machine slows all of
them. A ratio to the base is taken within a round. Figures are medians over the rounds.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from minift.data.tokens import Example
from minift.device import dtype_name, machine_name, time_call
from minift.errors import UserError
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.modes import MODES
from minift.report.table import table

BATCH = 16  # prompts of the larger request
# The second smallest and the second largest of 9 values hold the median of their distribution with a probability of
# 1 - 2 (1 + 9) / 2^9 = 96 % (the sign test), whatever the distribution is.
ROUNDS = 9
INTERVAL = 0.96
MARGIN = 1.1  # a model is slower from this ratio on: half of what adapters cost at least in the LoRA paper


def frozen_copy(model: GPT) -> GPT:
    """A copy with every weight in the compute dtype, as in a model that no longer trains; `model` does not change."""
    copy = model.shared_copy()
    copy.set_compute_dtype(copy.compute_dtype)
    return copy


def models_to_time(base: GPT, tuned: GPT, mode: str) -> dict[str, GPT]:
    """base, tuned and, where the mode can merge, merged, all of them copies."""
    models = {"base": frozen_copy(base), "tuned": frozen_copy(tuned)}
    if MODES[mode].merge is not None:
        merged = tuned.shared_copy()
        MODES[mode].merge(merged)
        models["merged"] = frozen_copy(merged)
    return models


def choose_prompts(examples: Sequence[Example], room: int) -> dict[int, list[list[int]]]:
    """The requests: {batch: prompts}, from test rows drawn by a fixed seed.

    A prompt of more than `room` tokens loses its beginning, as in scoring. One prompt is the one of median length. With
    fewer than 16 rows, prompts repeat.
    """
    chosen = random.Random(0).sample(range(len(examples)), min(BATCH, len(examples)))
    prompts = [examples[chosen[i % len(chosen)]].prompt[-room:] for i in range(BATCH)]
    return {1: [sorted(prompts, key=len)[BATCH // 2]], BATCH: prompts}


def time_request(model: GPT, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds of a request until each prompt has its first new token, and until it has `new_tokens`, in two calls."""
    first = time_call(lambda: generate(model, prompts, 1), model.device)
    return first, time_call(lambda: generate(model, prompts, new_tokens), model.device)


def time_in_turn(models: dict[str, GPT], prompts: list[list[int]],
                 new_tokens: int) -> dict[str, list[tuple[float, float]]]:
    """The times of ROUNDS requests for each model, after one that does not count."""
    names = list(models)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(-1, ROUNDS):
        first = number % len(names)  # another model begins in each round
        for name in names[first:] + names[:first]:
            seconds = time_request(models[name], prompts, new_tokens)
            if number >= 0:
                times[name].append(seconds)
    return times


def median_interval(name: str, values: list[float]) -> dict[str, Any]:
    """The median of ROUNDS values under a name, and its interval of 96 %."""
    ordered = sorted(values)
    return {name: statistics.median(ordered), f"{name}_interval": [ordered[1], ordered[-2]]}


def summarise(times: dict[str, list[tuple[float, float]]], batch: int, new_tokens: int) -> dict[str, dict[str, Any]]:
    """The figures of each model."""
    token_seconds = {name: [(total - first) / (new_tokens - 1) for first, total in pairs]
                     for name, pairs in times.items()}
    figures = {}
    for name, pairs in times.items():
        first_ratios = [own[0] / base[0] for own, base in zip(pairs, times["base"], strict=True)]
        token_ratios = [own / base for own, base in zip(token_seconds[name], token_seconds["base"], strict=True)]
        figures[name] = {
            **median_interval("first_token_ms", [1e3 * first for first, _ in pairs]),
            **median_interval("ms_per_token", [1e3 * seconds for seconds in token_seconds[name]]),
            **median_interval("tokens_per_second", [batch * new_tokens / total for _, total in pairs]),
            **median_interval("first_token_ratio", first_ratios),
            **median_interval("ms_per_token_ratio", token_ratios),
        }
    return figures


def measure(base: GPT, tuned: GPT, mode: str, examples: Sequence[Example], new_tokens: int) -> dict[str, Any]:
    """The figures for result.json: {model: {batch: figures}}, and the settings. Raises UserError if there is no room
    for a prompt, or nothing to time."""
    if new_tokens < 2:
        raise UserError("--latency needs --max-new-tokens of 2 or more: the first token is timed by itself")
    room = base.config.n_positions - tuned.prompt_tokens - new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens {new_tokens} leaves no room for a prompt in the model's "
                        f"{base.config.n_positions} positions: lower it")
    models = models_to_time(base, tuned, mode)
    result: dict[str, Any] = {name: {} for name in models}
    requests = choose_prompts(examples, room)
    for batch, prompts in requests.items():
        figures = summarise(time_in_turn(models, prompts, new_tokens), batch, new_tokens)
        for name in models:
            result[name][str(batch)] = figures[name]
    lengths = {str(batch): statistics.mean(map(len, prompts)) for batch, prompts in requests.items()}
    dtype = dtype_name(base.compute_dtype)
    result["settings"] = {"rounds": ROUNDS, "interval": INTERVAL, "new_tokens": new_tokens, "prompt_tokens": lengths,
                          "machine": machine_name(base.device), "dtype": dtype}
    ratios = {name: median_and_interval(result[name]["1"], "ms_per_token_ratio") for name in models}
    result["table1"] = table1(ratios, adds_layers(tuned), tuned.prompt_tokens > 0)
    return result


def median_and_interval(figures: dict[str, Any], name: str) -> tuple[float, float, float]:
    return (figures[name], *figures[f"{name}_interval"])


# ---- Table 1 of the LoRA paper


def adds_layers(model: GPT) -> bool:
    """Whether the model has parameters that GPT-2 does not have."""
    with torch.device("meta"):
        plain = GPT(model.config)
    return len(list(model.parameters())) > len(list(plain.parameters()))


def table1(ratios: dict[str, tuple[float, float, float]], adds_layers: bool, has_prompt: bool) -> str:
    """A sentence: whether the result of Hu et al. 2021, Table 1, came out here. There, with GPT-2 medium on a GPU and
    one row of 128 tokens, adapters took 21 to 30 % longer than a model without; merged LoRA took no longer.

    `ratios` are each model's time per token at batch 1, divided by the base's.
    """
    paper = "Hu et al. 2021, Table 1 (adapters are slower at batch 1, merged LoRA is not)"
    name = "merged" if "merged" in ratios else "tuned"
    if name == "tuned" and has_prompt:
        return f"{paper}: it has no soft prompts or prefixes, so nothing is to be compared"
    median, low, high = ratios[name]
    measured = f"{name} takes {median:.2f} [{low:.2f}, {high:.2f}] times the base's time per token"
    if low <= MARGIN <= high:
        return f"{paper} is undecided, the interval contains {MARGIN}: {measured}"
    expect_slower = name == "tuned" and adds_layers
    outcome = "came out" if (low > MARGIN) == expect_slower else "did not come out"
    return f"{paper} {outcome}: {measured}"


# ---- the report


def short(value: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*value)


def whole(value: tuple[float, float, float]) -> str:
    return "{:,.0f} [{:,.0f}, {:,.0f}]".format(*value)


COLUMNS = {
    "model": ("model", str),
    "batch": ("batch", str),
    "first_token_ms": ("first token, ms", short),
    "ms_per_token": ("ms per token", short),
    "tokens_per_second": ("tokens/s", whole),
    "first_token_ratio": ("first token / base", short),
    "ms_per_token_ratio": ("ms per token / base", short),
}


def report(result: dict[str, Any]) -> str:
    """The table of `measure`, its settings and the sentence on Table 1."""
    settings = result["settings"]
    lengths = settings["prompt_tokens"]
    head = (f"latency, {settings['machine']}, {settings['dtype']}: {settings['new_tokens']} new tokens after a prompt "
            f"of {lengths['1']:.0f} tokens, or after {BATCH} of {lengths[str(BATCH)]:.0f} on average; medians of "
            f"{settings['rounds']} rounds, [{settings['interval']:.0%} intervals]")
    rows = []
    for batch in lengths:
        for name in ("base", "tuned", "merged"):
            if name in result:
                figures = result[name][batch]
                values = {column: median_and_interval(figures, column) for column in list(COLUMNS)[2:]}
                rows.append({"model": name, "batch": batch} | values)
    return "\n".join([head, table(rows, COLUMNS), result["table1"]])
