"""How good a model is: its loss on target tokens, and ROUGE and exact match of its completions.

Forgetting is the loss on general text (`text_windows`), outside the task, after tuning minus before.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from minift.data.dataset import read_text, row_lengths
from minift.data.tokens import Example
from minift.distributed import RANK, WORLD_SIZE, all_sum, local_rows, reshard
from minift.errors import UserError
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.model.packing import Row, text_row
from minift.report.rouge import rouge, rouge_tokens
from minift.report.unsupported import check, ordinary_words

LOGITS_BLOCK = 128  # target tokens whose logits (block, V) exist at one time, so that scoring takes little memory
DECODE_BATCH = 64  # prompts that are completed together
NO_REFERENCES = 64  # the limit of new tokens if there are no completions whose lengths could decide on it
MAX_WINDOW = 512  # tokens of a window of general text
ROUGE = ("rouge1", "rouge2", "rougeL")
TEXT_SCORES = ("exact_match", *ROUGE)


@torch.no_grad()
def measure_losses(model: GPT, rows: Sequence[Row], batch: int) -> dict[str, Any]:
    """Over all target tokens of the rows: loss in nats per token, perplexity, and token_accuracy; and row_losses, the
    nats of each row, in the rows' order.

    token_accuracy is the share of targets that are the most likely token, given the true tokens before them. Each
    process scores its part of the rows, and all of them return the result for all rows.
    """
    was_training = model.training
    model.eval()  # no dropout
    loss = correct = count = 0
    row_losses = [0.0] * len(rows)
    # similar lengths in a batch need the least memory
    order = np.argsort(row_lengths(rows), kind="stable")
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        local = local_rows([rows[i] for i in indices])
        packed = model.pack(local)
        hidden = model.hidden(packed, packed.target_positions)  # (n, C)
        hidden_blocks = hidden.split(LOGITS_BLOCK)
        target_blocks = packed.targets.split(LOGITS_BLOCK)
        nats = []
        for h, targets in zip(hidden_blocks, target_blocks, strict=True):
            logits = model.logits(h)  # (block, V)
            # PyTorch's own cross-entropy in two steps, not the op of training, so that a score does not depend on it
            log_probs = F.log_softmax(logits, -1)
            loss += F.nll_loss(log_probs, targets, reduction="sum").item()
            nats.append(F.nll_loss(log_probs, targets, reduction="none"))
            correct += (logits.argmax(-1) == targets).sum().item()
        count += len(packed.targets)
        by_row = torch.cat(nats).double().cpu().split([row.num_targets for row in local])
        for i, row_nats in zip(indices[RANK::WORLD_SIZE], by_row, strict=False):
            row_losses[i] = row_nats.sum().item()
    reshard(model)  # a pass without a backward pass leaves sharded parameters gathered
    model.train(was_training)
    loss, correct, count, *row_losses = all_sum(loss, correct, count, *row_losses)  # 0 for the other processes' rows
    return {"loss": loss / count, "perplexity": safe_exp(loss / count), "token_accuracy": correct / count,
            "row_losses": row_losses}


def safe_exp(x: float) -> float:
    """exp(x), or infinity if it is too large for a float."""
    return math.exp(x) if x < 709 else math.inf  # the largest float is about exp(709.8)


def load_general_rows(path: str | Path, tokenizer: Tokenizer, n_positions: int, reserved: int) -> list[Row]:
    """The text of a file as rows for `measure_losses`, see `text_windows`. Raises UserError."""
    ids = tokenizer.encode(read_text(path), add_special_tokens=False).ids
    if len(ids) < 2:
        raise UserError(f"--general {path} has fewer than two tokens, so it has no loss: give a longer text")
    return text_windows(ids, n_positions, reserved)


def text_windows(ids: list[int], n_positions: int, reserved: int) -> list[Row]:
    """The token ids of a text as rows, so that every token but the first is a target once.

    `reserved` are the most positions that any of the compared models uses for a soft prompt or a prefix.
    """
    # half of the positions, so that models with and without a soft prompt read the same windows
    window = min(MAX_WINDOW, n_positions // 2, n_positions - reserved)
    # windows overlap by one token: a window's last target is the first token that the next one reads
    return [text_row(ids[start : start + window + 1]) for start in range(0, len(ids) - 1, window)]


def write_completions(model: GPT, tokenizer: Tokenizer, eos_id: int, examples: Sequence[Example],
                      max_new_tokens: int) -> tuple[list[str], dict[str, int]]:
    """Greedy completions of the rows, in their order, without white space at both ends; "" for a text alone. And three
    counts: completions, prompts and references that a limit cut.

    Raises UserError if `max_new_tokens` leaves no position for a prompt.
    """
    n_positions = model.config.n_positions
    room = n_positions - model.prompt_tokens - max_new_tokens  # the most tokens of a prompt
    if room < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's "
                        f"{n_positions} positions: lower it")
    texts = [""] * len(examples)
    at_limit = shortened = too_long = 0
    prompted = [i for i, example in enumerate(examples) if example.pair.prompt]
    order = sorted(prompted, key=lambda i: len(examples[i].prompt))  # prompts of similar length form a batch
    for first in range(0, len(order), DECODE_BATCH):
        indices = order[first : first + DECODE_BATCH]
        prompts = []
        for i in indices:
            prompts.append(examples[i].prompt[-room:])  # training cuts the beginning, too
            shortened += len(examples[i].prompt) > room
            too_long += reference_length(examples[i], eos_id) > max_new_tokens
        for i, new in zip(indices, generate(model, prompts, max_new_tokens, stop=eos_id), strict=True):
            texts[i] = tokenizer.decode(new).strip()
            at_limit += len(new) == max_new_tokens
    return texts, {"completions_at_limit": at_limit, "prompts_shortened": shortened,
                   "references_over_limit": too_long}


def reference_length(example: Example, eos_id: int) -> int:
    """The number of tokens of a row's completion, without the end-of-text after it."""
    begin, end = example.spans[-1]
    return end - begin - (example.ids[end - 1] == eos_id)


def choose_max_new_tokens(rows: dict[str, Sequence[Example]], eos_id: int, room: int) -> tuple[int, str]:
    """The default of --max-new-tokens, and its origin.

    It is enough for the longest completion of the validation rows (of the training rows if there are none) and its
    end-of-text, but at most half of `room`, the model's positions.
    """
    kind, examples = ("validation", rows["val"]) if rows["val"] else ("training", rows["train"])
    lengths = [reference_length(example, eos_id) for example in examples if example.pair.prompt]
    limit = max(1, room // 2)
    if not lengths:
        return min(NO_REFERENCES, limit), "there are no completions to follow"
    longest = max(lengths)
    if longest + 1 > limit:
        return limit, f"half of the model's positions; the longest {kind} reference has {longest} tokens"
    return longest + 1, f"the longest {kind} reference has {longest} tokens, then comes an end-of-text"


def score_row(example: Example, completion: str, loss: float, ordinary: set[str]) -> dict[str, Any]:
    """The scores of one row: `loss` in nats, summed over its `targets`; exact_match (0 or 1), which ignores white space
    at both ends; rouge1, rouge2 and rougeL in 0..1; the number of names and numbers, and of those that are unsupported.
    """
    pair = example.pair
    row = {"where": pair.where, "loss": loss, "targets": example.num_targets, "completion": completion}
    if not pair.prompt:  # a text alone has no reference
        return row | dict.fromkeys(TEXT_SCORES) | {"names": 0, "unsupported": 0, "unsupported_words": []}
    row |= rouge(completion, pair.completion)
    row["exact_match"] = int(completion.strip() == pair.completion.strip())
    names, words = check(completion, (pair.prompt, pair.completion), ordinary)
    return row | {"names": names, "unsupported": len(words), "unsupported_words": words}


def text_scores(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The means over the rows that have a reference, and `unsupported`, the share of all their names and numbers."""
    scores: dict[str, float | None] = {}
    for name in TEXT_SCORES:
        values = [row[name] for row in rows if row[name] is not None]
        scores[name] = sum(values) / len(values) if values else None
    names = sum(row["names"] for row in rows)
    scores["unsupported"] = sum(row["unsupported"] for row in rows) / names if names else None
    return scores


def score(model: GPT, tokenizer: Tokenizer, eos_id: int, examples: Sequence[Example], batch: int,
          max_new_tokens: int, general_rows: list[Row] | None) -> dict[str, Any]:
    """All scores of a model on some rows, by the names of result.json, with its completions and their counts, and
    `rows`, the scores of each row.

    general_loss is the loss on the general text; None without such a text.
    """
    scores: dict[str, Any] = dict.fromkeys(("loss", "perplexity", "token_accuracy"))  # None: there are no rows
    row_losses = []
    if examples:
        scores |= measure_losses(model, examples, batch)
        row_losses = scores.pop("row_losses")
    completions, counts = write_completions(model, tokenizer, eos_id, examples, max_new_tokens)
    ordinary = ordinary_words(text for example in examples for text in (example.pair.prompt, example.pair.completion))
    rows = [score_row(example, completion, loss, ordinary)
            for example, completion, loss in zip(examples, completions, row_losses, strict=True)]
    if not any(rouge_tokens(example.pair.completion) for example in examples if example.pair.prompt):
        for row in rows:  # no reference has a word: a 0 would look like a bad model
            row |= dict.fromkeys(ROUGE)
    scores |= text_scores(rows)
    scores["general_loss"] = measure_losses(model, general_rows, batch)["loss"] if general_rows else None
    return scores | counts | {"completions": completions, "rows": rows}


def limit_report(scores: dict[str, Any], max_new_tokens: int) -> list[str]:
    """A line for each limit that made the completions of `score` worse than the model could write them."""
    rows = len(scores["completions"])
    lines = []
    if count := scores["completions_at_limit"]:
        lines.append(f"{count} of {rows} completions were cut at the limit while generating: "
                     f"--max-new-tokens is {max_new_tokens}")
    if count := scores["references_over_limit"]:
        lines.append(f"{count} of {rows} references are longer than what is generated, so they cannot be "
                     f"matched: raise --max-new-tokens, now {max_new_tokens}")
    if count := scores["prompts_shortened"]:
        lines.append(f"{count} of {rows} prompts were shortened at their beginning to make room for "
                     f"generated tokens: lower --max-new-tokens, now {max_new_tokens}")
    return lines
