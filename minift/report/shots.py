"""eval.py --shots N: the base with N training rows before each prompt, beside the tuned model without them.

The training rows (shots) of a test row are drawn by a fixed seed, anew for each test row (Brown et al. 2020), and those
that fit stay. Each is joined and cut as in training. Two tokens are tried as the end of every row, and so between rows:
the end-of-text of training, and the line end of Brown et al. GPT-2 learned that texts on both sides of an end-of-text
are independent, so the base may follow shots better with line ends. Only the completion of the test row and its end are
scored.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minift.data.tokens import Example, tokenize
from minift.device import time_call
from minift.errors import UserError
from minift.files.weights import Base
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.report.bootstrap import Estimate, difference, estimate, interval
from minift.report.latency import frozen_copy
from minift.report.metrics import measure_losses, write_completions
from minift.report.rouge import rouge, rouge_tokens
from minift.report.table import table

MOST_TRAIN_ROWS = 10_000  # shots are drawn from the first so many training rows
REQUESTS = 16  # test rows that are timed, one by one


@dataclass(frozen=True)
class Way:
    """One way to answer the test rows: a model, and the rows as it reads them."""

    name: str
    model: GPT
    rows: list[Example]
    end: int  # the token that ends every row
    shots: list[int]  # the number of training rows in each row


# ---- rows


def put_shots(test: Example, train: Sequence[Example], wanted: int, room: int, end: int,
              seed: int) -> tuple[Example, int]:
    """A test row after as many of `wanted` drawn training rows as fit into `room` tokens, and their number. `end` is
    the last token of every row. Only the last span of the test row, its completion, stays a target."""
    ids: list[int] = []
    fitted = 0
    for i in random.Random(seed).sample(range(len(train)), min(wanted, len(train))):
        shot = train[i].ids
        if len(ids) + len(shot) <= room:
            ids += [*shot[:-1], end]
            fitted += 1
    begin, stop = test.spans[-1]
    return Example([*ids, *test.ids[:-1], end], ((len(ids) + begin, len(ids) + stop),), test.pair), fitted


def line_end(base: Base, *splits: Sequence[Example]) -> int | None:
    """The token of a line end; None if the tokenizer has no single one, or a completion holds it."""
    (ids,) = tokenize(base.tokenizer, ["\n"])
    used = any(ids[0] in row.ids[slice(*row.spans[-1])] for rows in splits for row in rows)
    return ids[0] if len(ids) == 1 and not used else None


def shot_room(model: GPT, test: Example, max_new_tokens: int) -> int:
    """The tokens that are free for shots: the row, and its prompt with the new tokens, must still fit."""
    free = model.config.n_positions - model.prompt_tokens
    return free - max(len(test.ids), len(test.prompt) + max_new_tokens)


def find_ways(base: Base, tuned: GPT, rows: dict[str, Sequence[Example]], wanted: int,
              max_new_tokens: int) -> list[Way]:
    """The base without shots, the base with them for each end of rows, and the tuned model. Raises UserError."""
    train, test = rows["train"], rows["test"]
    if not all(row.pair.prompt for row in test):
        raise UserError("--shots needs rows with a prompt and a completion, and these are texts alone")
    if len(test) < 2:
        raise UserError("--shots needs two test rows or more, since they give the intervals")
    eos = base.eos_token_id
    ends = {"end-of-text": eos, "line ends": line_end(base, train, test)}
    alone = [put_shots(row, [], 0, 0, eos, 0)[0] for row in test]
    none = [0] * len(test)
    ways = [Way("base", base.model, alone, eos, none)]
    for name, end in ends.items():
        if end is not None:
            filled, fitted = [], []
            for i, row in enumerate(test):
                room = shot_room(base.model, row, max_new_tokens)
                example, number = put_shots(row, train, wanted, room, end, i)
                filled.append(example)
                fitted.append(number)
            ways.append(Way(f"base, {wanted} shots, {name}", base.model, filled, end, fitted))
    ways.append(Way("tuned", tuned, alone, eos, none))
    return ways


# ---- measures


def time_in_turn(ways: list[Way], max_new_tokens: int) -> dict[str, list[float]]:
    """The seconds of some requests, each one row, until its end or the limit of new tokens. All models answer a request
    before the next one, in a rotated order. The first request is repeated: its first time does not count."""
    models = {way.name: frozen_copy(way.model) for way in ways}
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    chosen = random.Random(0).sample(range(len(ways[0].rows)), min(REQUESTS, len(ways[0].rows)))
    for number, i in enumerate([chosen[0], *chosen]):
        first = number % len(ways)
        for way in ways[first:] + ways[:first]:
            model, prompt = models[way.name], request(way, i, max_new_tokens)
            answer = partial(generate, model, [prompt], max_new_tokens, stop=way.end)
            taken = time_call(answer, model.device)
            if number > 0:
                seconds[way.name].append(taken)
    return seconds


def request(way: Way, i: int, max_new_tokens: int) -> list[int]:
    """The prompt of a row as it is completed: its beginning is cut if the new tokens need the room."""
    return way.rows[i].prompt[-(way.model.config.n_positions - way.model.prompt_tokens - max_new_tokens) :]


def with_interval(name: str, found: Estimate) -> dict[str, Any]:
    """An estimate under a name, and its 95 % interval."""
    return {name: found.value, f"{name}_interval": interval(found)}


def score(way: Way, base: Base, batch: int, max_new_tokens: int) -> dict[str, Estimate]:
    """The loss in nats per token and, if any reference has a word, ROUGE-L, over the test rows."""
    losses = measure_losses(way.model, way.rows, batch)["row_losses"]
    scores = {"loss": over_rows(losses, [row.num_targets for row in way.rows])}
    references = [row.pair.completion for row in way.rows]
    if any(rouge_tokens(reference) for reference in references):
        completions, _ = write_completions(way.model, base.tokenizer, way.end, way.rows, max_new_tokens)
        values = [rouge(text, reference)["rougeL"] for text, reference in zip(completions, references, strict=True)]
        scores["rougeL"] = over_rows(values, [1] * len(values))
    return scores


def over_rows(numerators: list[float], denominators: list[float]) -> Estimate:
    """The ratio of two sums over rows."""
    return estimate(np.array([numerators], dtype=float), np.array([denominators], dtype=float))


def measure(base: Base, tuned: GPT, rows: dict[str, Sequence[Example]], wanted: int, batch: int,
            max_new_tokens: int) -> dict[str, Any]:
    """For result.json: the figures of the base with shots (with the better end of rows), those of every way to answer,
    and the differences to the tuned model. Raises UserError."""
    ways = find_ways(base, tuned, rows, wanted, max_new_tokens)
    seconds = time_in_turn(ways, max_new_tokens)
    scores = {way.name: score(way, base, batch, max_new_tokens) for way in ways}
    models: dict[str, dict[str, Any]] = {}
    for way in ways:
        times = seconds[way.name]
        lengths = [way.model.prompt_tokens + len(row.prompt) for row in way.rows]
        models[way.name] = {
            "fitted": statistics.mean(way.shots), "rows_with_all": way.shots.count(wanted),
            "prompt_tokens": statistics.mean(lengths),
            **with_interval("seconds", over_rows(times, [1] * len(times))),
        }  # fmt: skip
        for name, found in scores[way.name].items():
            models[way.name] |= with_interval(name, found)
    differences = {}
    for way in ways[1:-1]:
        differences[way.name] = change = with_interval("seconds_ratio", over_rows(seconds["tuned"], seconds[way.name]))
        for name, found in scores[way.name].items():
            change |= with_interval(name, difference(scores["tuned"][name], found))
        change["prompt_tokens_ratio"] = models["tuned"]["prompt_tokens"] / models[way.name]["prompt_tokens"]
    best = max(differences, key=lambda name: (models[name].get("rougeL", 0), -models[name]["loss"]))
    return {"shots": wanted, "best": best, **models[best], "test_rows": len(rows["test"]),
            "requests": len(seconds["tuned"]), "models": models, "differences": differences,
            "came_out": all(map(is_better, differences.values()))}


def is_better(change: dict[str, Any]) -> bool:
    """Whether the tuned model is better than the base with shots, by ROUGE-L or else by loss, with fewer tokens."""
    better = change["rougeL_interval"][0] > 0 if "rougeL" in change else change["loss_interval"][1] < 0
    return better and change["prompt_tokens_ratio"] < 1


# ---- the report


def short(figures: dict[str, Any], name: str, form: str = "{:.3f} [{:.3f}, {:.3f}]") -> str:
    return form.format(figures[name], *figures[f"{name}_interval"])


COLUMNS = {
    "model": ("model", str),
    "fitted": ("shots that fit", "{:.2f}".format),
    "prompt_tokens": ("prompt tokens", "{:.1f}".format),
    "loss": ("loss", str),
    "rougeL": ("ROUGE-L", str),
    "seconds": ("seconds a request", str),
}


def report(result: dict[str, Any]) -> str:
    """The table of `measure`, and a line for each comparison."""
    total = result["test_rows"]
    rows = []
    for name, figures in result["models"].items():
        cells = {key: short(figures, key) for key in ("loss", "rougeL", "seconds") if key in figures}
        rows.append({"model": name} | figures | cells)
    lines = [f"shots, {total:,} test rows; seconds of {result['requests']} requests, one by one; [95 % intervals]",
             table(rows, COLUMNS)]
    for name, change in result["differences"].items():
        fitted = result["models"][name]["rows_with_all"]
        lines.append(f"{name}: all {result['shots']} fit in {fitted:,} of {total:,} rows")
        signed = "{:+.3f} [{:+.3f}, {:+.3f}]"
        parts = [f"{heading} {short(change, key, signed)}" for key, heading in (("loss", "loss"), ("rougeL", "ROUGE-L"))
                 if key in change]
        parts += [f"{change['prompt_tokens_ratio']:.2f} times the prompt tokens",
                  f"{short(change, 'seconds_ratio')} times the seconds"]
        lines.append(f"  tuned against it: {', '.join(parts)}")
    if len(result["differences"]) == 1:
        lines.append("not tried with line ends: a completion holds one, or the tokenizer has no single token for it")
    lines.append(f"better results with fewer tokens: {'came out' if result['came_out'] else 'did not come out'}")
    return "\n".join(lines)
