"""How good a model is: loss on target tokens, ROUGE and exact match of what it generates, and what it
forgot."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from minift.data.dataset import Example
from minift.distributed import all_sum, local_rows, reshard
from minift.errors import UserError
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.model.packing import Row, text_row

LOGITS = 128  # tokens whose logits exist at one time: below what a training step takes


@dataclass(frozen=True)
class Losses:
    """Over all target tokens of a set of rows: nats a token, its exponential, and the share predicted
    right."""

    loss: float
    perplexity: float
    token_accuracy: float


@dataclass(frozen=True)
class Texts:
    """What a model wrote for a set of rows: shares of exact matches, and mean ROUGE F-measures, all in
    0..1."""

    exact_match: float
    rouge1: float
    rouge2: float
    rougeL: float


def words(text: str) -> list[str]:
    """The tokens of the rouge-score package without its stemmer: lower case, runs of a-z and 0-9."""
    return re.findall(r"[a-z0-9]+", text.lower())


def f_measure(matches: int, predicted: int, wanted: int) -> float:
    return 2 * matches / (predicted + wanted) if matches else 0.0


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, a row of the table at a time in the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = (1 << len(a)) - 1
    for word in b:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & (1 << len(a)) - 1
    return len(a) - row.bit_count()


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004) as F-measures, equal to the rouge-score package's without stemming."""
    p, r = words(prediction), words(reference)
    scores = {}
    for n in (1, 2):
        grams = [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (p, r)]
        overlap = (grams[0] & grams[1]).total()
        scores[f"rouge{n}"] = f_measure(overlap, grams[0].total(), grams[1].total())
    return scores | {"rougeL": f_measure(longest_common_subsequence(p, r), len(p), len(r))}


@torch.no_grad()
def measure_losses(model: GPT, examples: list[Example], batch: int) -> Losses:
    """Teacher-forced scores of all rows, shared by all ranks; rows of like length share a batch, which
    changes no number."""
    was_training = model.training
    model.eval()
    loss = right = count = 0
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), batch):
        packed = model.pack(local_rows(ordered[start : start + batch]))
        hidden = model.hidden(packed, packed.target_positions)  # (n, C)
        for h, target in zip(hidden.split(LOGITS), packed.targets.split(LOGITS), strict=True):
            logits = model.logits(h)
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            right += (logits.argmax(-1) == target).sum().item()
        count += len(packed.targets)
    reshard(model)
    model.train(was_training)
    loss, right, count = all_sum(loss, right, count)
    return Losses(loss / count, safe_exp(loss / count), right / count)


def safe_exp(x: float) -> float:
    """exp(x), infinite where a float ends."""
    return math.exp(x) if x < 709 else math.inf


def write_completions(model: GPT, tokenizer: Tokenizer, eos_id: int, examples: list[Example],
                      max_new_tokens: int, batch: int) -> list[str]:
    """Greedy completions of the rows' prompts, in their order; a prompt that leaves no room loses its
    beginning."""
    room = model.config.n_positions - model.prompt_tokens - max_new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's "
                        f"{model.config.n_positions} positions: lower it")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    texts = [""] * len(examples)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        prompts = [examples[i].prompt[-room:] for i in rows]
        written = generate(model, prompts, max_new_tokens, stop=eos_id)
        for i, new in zip(rows, written, strict=True):
            texts[i] = tokenizer.decode(new).strip()
    return texts


def score_texts(predictions: list[str], references: list[str]) -> Texts:
    """Predictions against references, row by row; an exact match ignores white space at both ends."""
    rows = [{"exact_match": float(p.strip() == r.strip()), **rouge(p, r)}
            for p, r in zip(predictions, references, strict=True)]
    return Texts(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def text_windows(tokenizer: Tokenizer, text: str, model: GPT) -> list[Row]:
    """A text outside the task as rows of half the model's positions (512 at most), so that base and tuned model
    read the same windows even with a soft prompt in front."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    n_positions = model.config.n_positions
    window = min(512, n_positions // 2, n_positions - model.prompt_tokens)
    rows = [text_row(ids[i : i + window + 1]) for i in range(0, len(ids) - 1, window)]
    if not rows:
        raise UserError("the general text holds fewer than two tokens: there is nothing to score")
    return rows


def score(model: GPT, tokenizer: Tokenizer, eos_id: int, examples: list[Example], batch: int, max_new_tokens: int,
          general_text: str | None) -> dict[str, Any]:
    """Every score of a model on some rows under the names of result.json, the completions it wrote, and its
    loss on general text where there is one."""
    losses = measure_losses(model, examples, batch)
    completions = write_completions(model, tokenizer, eos_id, examples, max_new_tokens, batch=64)
    texts = score_texts(completions, [example.pair.completion for example in examples])
    general_loss = None
    if general_text is not None:
        general_loss = measure_losses(model, text_windows(tokenizer, general_text, model), batch).loss
    return {**asdict(losses), **asdict(texts), "general_loss": general_loss, "completions": completions}
